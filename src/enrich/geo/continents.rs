//! Which continent a country is on, for databases that do not say it, and what a country
//! is.
//!
//! Compiled by us from public facts: the codes of ISO 3166-1 alpha-2, each on the continent
//! where the United Nations' geographic regions (M49) have it, the Americas in two; Taiwan
//! by its place; and XK, as many write Kosovo, which has no code of its own.

const CONTINENTS: [(&str, &str); 7] = [
    (
        "AF",
        "AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG EH ER ET GA GH GM GN GQ GW IO KE KM LR LS LY MA MG ML MR \
MU MW MZ NA NE NG RE RW SC SD SH SL SN SO SS ST SZ TD TF TG TN TZ UG YT ZA ZM ZW",
    ),
    ("AN", "AQ"),
    (
        "AS",
        "AE AF AM AZ BD BH BN BT CN CY GE HK ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB LK MM MN MO MV MY \
NP OM PH PK PS QA SA SG SY TH TJ TL TM TR TW UZ VN YE",
    ),
    (
        "EU",
        "AD AL AT AX BA BE BG BY CH CZ DE DK EE ES FI FO FR GB GG GI GR HR HU IE IM IS IT JE LI LT LU LV MC \
MD ME MK MT NL NO PL PT RO RS RU SE SI SJ SK SM UA VA XK",
    ),
    (
        "NA",
        "AG AI AW BB BL BM BQ BS BZ CA CR CU CW DM DO GD GL GP GT HN HT JM KN KY LC MF MQ MS MX NI PA PM PR \
SV SX TC TT US VC VG VI",
    ),
    ("OC", "AS AU CC CK CX FJ FM GU HM KI MH MP NC NF NR NU NZ PF PG PN PW SB TK TO TV UM VU WF WS"),
    ("SA", "AR BO BR BV CL CO EC FK GF GS GY PE PY SR UY VE"),
];

/// The continent of a country, if its two capital letters are one's.
pub(super) fn continent_of(country: &str) -> Option<&'static str> {
    let is_there = |countries: &str| countries.split(' ').any(|code| code == country);
    CONTINENTS.iter().find(|(_, countries)| is_there(countries)).map(|(continent, _)| *continent)
}

/// A continent, if two letters are one's.
pub(super) fn continent(code: &str) -> Option<&'static str> {
    CONTINENTS.iter().map(|(continent, _)| *continent).find(|continent| continent.eq_ignore_ascii_case(code))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_country_is_on_one_continent() {
        let codes: Vec<_> = CONTINENTS.iter().flat_map(|(_, countries)| countries.split(' ')).collect();
        assert_eq!(codes.iter().collect::<HashSet<_>>().len(), codes.len(), "none is on two");
        assert_eq!(codes.len(), 249 + 1, "all of ISO 3166-1, and Kosovo");
        assert!(
            codes.iter().all(|code| code.len() == 2 && code.bytes().all(|byte| byte.is_ascii_uppercase()))
        );
        for (country, continent) in [
            ("DE", Some("EU")),
            ("US", Some("NA")),
            ("BR", Some("SA")),
            ("JP", Some("AS")),
            ("ZA", Some("AF")),
            ("NZ", Some("OC")),
            ("AQ", Some("AN")),
            ("XK", Some("EU")),
            ("XX", None),
            ("T1", None),
            ("EU", None),
            ("de", None),
            ("", None),
            ("D", None),
            (" ", None),
        ] {
            assert_eq!(continent_of(country), continent, "{country}");
        }
        assert_eq!((continent("eu"), continent("XX"), continent("")), (Some("EU"), None, None));
    }
}
