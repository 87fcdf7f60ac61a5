//! The channel that somebody came through: the first of nineteen rules that fits.

use super::{
    campaign::{Campaign, Clicks},
    source::{Kind, Source},
};

/// All that the rules look at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// True if anybody is named as the source, known or not.
    pub(super) has_source: bool,
    /// The source, if it is known.
    pub(super) source: Option<&'a Source>,
    pub(super) campaign: Option<&'a Campaign<'a>>,
    pub(super) clicks: Option<&'a Clicks<'a>>,
}

/// The channel's name.
pub(super) fn of(facts: &Facts<'_>) -> &'static str {
    let (medium, name) = (facts.medium(), facts.campaign_name());
    let is = |kind| facts.source.is_some_and(|source| source.kind == kind);
    let is_paid = is_paid_for(medium);
    let is_ad = is_paid || facts.source.is_some_and(|source| source.is_paid);
    let shop = Kind::Shopping;

    if contains(name, "cross-network") {
        "Cross-network"
    } else if is_ad && is(shop) || is_paid && speaks_of_a_shop(name) {
        "Paid Shopping"
    } else if is(Kind::Search) && (is_ad || facts.is_clicked_ad()) {
        "Paid Search"
    } else if is(Kind::Social) && is_ad {
        "Paid Social"
    } else if is(Kind::Video) && is_ad {
        "Paid Video"
    } else if is_one_of(medium, &["display", "banner", "expandable", "interstitial", "cpm"]) {
        "Display"
    } else if is_ad {
        "Paid Other"
    } else if is(shop) {
        "Organic Shopping"
    } else if is(Kind::Social) || starts_with(medium, "social") || is_one_of(medium, &["sm"]) {
        "Organic Social"
    } else if is(Kind::Video) || contains(medium, "video") {
        "Organic Video"
    } else if is(Kind::Assistant) {
        "AI Assistants"
    } else if is(Kind::Search) {
        "Organic Search"
    } else if is(Kind::Email) || is_one_of(medium, &["email", "e-mail", "e_mail", "e mail", "newsletter"]) {
        "Email"
    } else if is(Kind::Affiliate) || is_one_of(medium, &["affiliate", "affiliates"]) {
        "Affiliates"
    } else if is(Kind::Audio) || is_one_of(medium, &["audio", "podcast"]) {
        "Audio"
    } else if is(Kind::Sms) || is_one_of(medium, &["sms", "mms"]) {
        "SMS"
    } else if is(Kind::Push) || speaks_of_a_push(medium) {
        "Push"
    } else if facts.has_source {
        "Referral"
    } else {
        "Direct"
    }
}

impl<'a> Facts<'a> {
    fn medium(&self) -> &'a str {
        self.campaign.and_then(|campaign| campaign.medium.as_deref()).unwrap_or_default()
    }

    fn campaign_name(&self) -> &'a str {
        self.campaign.and_then(|campaign| campaign.name.as_deref()).unwrap_or_default()
    }

    /// True if a search engine has marked the click as that of an advertisement of its own.
    fn is_clicked_ad(&self) -> bool {
        let marks: &[&str] = match self.source.and_then(|source| source.name.as_deref()) {
            Some("Google") => &["gclid", "gbraid", "wbraid"],
            Some("Bing") => &["msclkid"],
            _ => return false,
        };
        self.clicks.is_some_and(|clicks| clicks.has(marks))
    }
}

fn is_paid_for(medium: &str) -> bool {
    contains(medium, "cp") || is_one_of(medium, &["ppc", "retargeting"]) || starts_with(medium, "paid")
}

/// `shopping`, and `shop` where a word or the `e` before it begins; not a workshop.
fn speaks_of_a_shop(campaign: &str) -> bool {
    let is_shop = |(at, four): (usize, &[u8])| {
        let is_letter = |at: usize| campaign.as_bytes()[at].is_ascii_alphabetic();
        let begins = at == 0 || !is_letter(at - 1);
        let is_electric = at > 0
            && campaign.as_bytes()[at - 1].eq_ignore_ascii_case(&b'e')
            && (at == 1 || !is_letter(at - 2));
        four.eq_ignore_ascii_case(b"shop") && (begins || is_electric)
    };
    contains(campaign, "shopping") || campaign.as_bytes().windows(4).enumerate().any(is_shop)
}

fn speaks_of_a_push(medium: &str) -> bool {
    let ends = medium.len().checked_sub("push".len()).and_then(|at| medium.get(at..));
    ends.is_some_and(|end| end.eq_ignore_ascii_case("push"))
        || contains(medium, "mobile")
        || contains(medium, "notification")
}

fn is_one_of(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.eq_ignore_ascii_case(word))
}

fn starts_with(text: &str, word: &str) -> bool {
    text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
}

/// Whatever the case; a text is short.
fn contains(text: &str, word: &str) -> bool {
    text.as_bytes().windows(word.len()).any(|part| part.eq_ignore_ascii_case(word.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{PageInput, PageSettings, Pages, parameters::CLICK_IDS},
        *,
    };

    /// Of a page with these parameters, to which somebody came from there.
    fn channel(query: &str, referrer: &str) -> &'static str {
        let pages = Pages::new(PageSettings::default()).unwrap();
        let input = PageInput {
            url: Some(format!("https://page.example/?{query}").into()),
            referrer: Some(referrer.to_owned().into()),
            ..PageInput::default()
        };
        pages.find(&input).channel.unwrap()
    }

    const GOOGLE: &str = "https://www.google.com/";
    const FACEBOOK: &str = "https://l.facebook.com/";
    const YOUTUBE: &str = "https://www.youtube.com/watch";
    const AMAZON: &str = "https://www.amazon.de/";

    #[test]
    fn each_channel_is_what_its_row_says() {
        let rows: [(&str, &[(&str, &str)]); 19] = [
            ("Cross-network", &[("utm_campaign=1_Cross-Network_2&utm_source=google&utm_medium=cpc", "")]),
            (
                "Paid Shopping",
                &[
                    ("utm_medium=cpc", AMAZON),
                    ("utm_source=google-shopping&utm_medium=PPC", ""),
                    ("utm_source=google&utm_medium=cpc&utm_campaign=Summer+Shopping", ""),
                    ("utm_medium=paid&utm_campaign=eShop_de", GOOGLE),
                    ("utm_source=amazon_ads", ""),
                ],
            ),
            (
                "Paid Search",
                &[
                    ("utm_source=google&utm_medium=cpc", ""),
                    ("utm_medium=CPC", GOOGLE),
                    ("utm_source=adwords", ""),
                    ("gclid=x", GOOGLE),
                    ("gbraid=x", "https://www.google.de/"),
                    ("wbraid=x", ""),
                    ("gclid=x", ""),
                    ("msclkid=x", "https://www.bing.com/"),
                    ("msclkid=x", ""),
                    ("utm_source=google&utm_medium=cpc&utm_campaign=workshop", ""),
                ],
            ),
            (
                "Paid Social",
                &[
                    ("utm_source=fb&utm_medium=paid-social", ""),
                    ("utm_source=facebook_ads", ""),
                    ("utm_medium=cpm", FACEBOOK),
                    ("utm_source=ig&utm_medium=retargeting&fbclid=x", ""),
                ],
            ),
            ("Paid Video", &[("utm_medium=cpv", YOUTUBE), ("utm_source=youtube&utm_medium=paid_video", "")]),
            (
                "Display",
                &[
                    ("utm_medium=banner", ""),
                    ("utm_source=news.example&utm_medium=Display", ""),
                    ("utm_medium=cpm", "https://news.example/"),
                    ("utm_medium=interstitial", FACEBOOK),
                    ("utm_medium=expandable", ""),
                ],
            ),
            (
                "Paid Other",
                &[
                    ("utm_source=partner&utm_medium=cpc", ""),
                    ("utm_medium=cpa", "https://news.example/"),
                    ("utm_source=taboola", ""),
                ],
            ),
            ("Organic Shopping", &[("", AMAZON), ("utm_source=ebay", ""), ("utm_medium=referral", AMAZON)]),
            (
                "Organic Social",
                &[
                    ("", FACEBOOK),
                    ("utm_source=linkedin", ""),
                    ("utm_source=partner&utm_medium=Social-Media", ""),
                    ("utm_medium=sm", ""),
                    ("fbclid=x", ""),
                    ("fbclid=x", FACEBOOK),
                    ("", "https://news.ycombinator.com/item"),
                ],
            ),
            ("Organic Video", &[("", YOUTUBE), ("utm_source=partner&utm_medium=promo-video", "")]),
            (
                "AI Assistants",
                &[
                    ("utm_source=chatgpt.com", ""),
                    ("", "https://www.perplexity.ai/search"),
                    ("utm_source=claude", ""),
                ],
            ),
            (
                "Organic Search",
                &[
                    ("", GOOGLE),
                    ("utm_source=bing", ""),
                    ("", "https://duckduckgo.com/"),
                    ("msclkid=x", GOOGLE),
                ],
            ),
            (
                "Email",
                &[
                    ("utm_medium=e-mail", ""),
                    ("utm_source=may&utm_medium=Email", ""),
                    ("utm_source=newsletter", ""),
                    ("", "https://mail.google.com/mail/u/0/"),
                    ("", "android-app://com.google.android.gm/"),
                ],
            ),
            (
                "Affiliates",
                &[("utm_source=partner&utm_medium=affiliate", ""), ("", "https://www.awin1.com/cread.php")],
            ),
            ("Audio", &[("utm_source=partner&utm_medium=audio", ""), ("utm_source=spotify", "")]),
            ("SMS", &[("utm_source=sms", ""), ("utm_source=partner&utm_medium=SMS", "")]),
            (
                "Push",
                &[
                    ("utm_source=partner&utm_medium=web-push", ""),
                    ("utm_source=partner&utm_medium=mobile", ""),
                    ("utm_medium=notification", ""),
                    ("utm_source=firebase", ""),
                ],
            ),
            (
                "Referral",
                &[
                    ("", "https://news.example/"),
                    ("ref=partner", ""),
                    ("source=partner", GOOGLE),
                    ("utm_medium=referral", "https://github.com/x"),
                    ("fbclid=x", "https://news.example/"),
                    ("", "https://notgoogle.com/"),
                ],
            ),
            (
                "Direct",
                &[
                    ("", ""),
                    ("", "https://blog.page.example/"),
                    ("utm_campaign=x", ""),
                    ("utm_source={{source}}", ""),
                    ("gclid=", ""),
                ],
            ),
        ];
        for (want, cases) in rows {
            for (query, referrer) in cases {
                assert_eq!(channel(query, referrer), want, "{query} {referrer}");
            }
        }
    }

    #[test]
    fn of_rules_that_fit_the_first_holds() {
        // Each of these fits all rows from one on.
        assert_eq!(
            channel("utm_source=google&utm_medium=cpc&utm_campaign=shop+cross-network", ""),
            "Cross-network"
        );
        assert_eq!(channel("utm_medium=cpc&utm_campaign=shop", FACEBOOK), "Paid Shopping");
        assert_eq!(channel("utm_medium=video", FACEBOOK), "Organic Social");
        assert_eq!(channel("utm_medium=email", GOOGLE), "Organic Search");
        assert_eq!(channel("utm_medium=social", YOUTUBE), "Organic Social");
    }

    #[test]
    fn a_shop_is_no_workshop() {
        for campaign in ["shop", "Shop-sale", "my shop", "eshop", "e-shop", "xShopping", "2shop"] {
            assert!(speaks_of_a_shop(campaign), "{campaign}");
        }
        for campaign in ["", "sho", "workshop", "bishop", "theshop", "s hop"] {
            assert!(!speaks_of_a_shop(campaign), "{campaign}");
        }
    }

    #[test]
    fn every_click_id_that_stands_alone_names_its_network() {
        let wanted = ["Google", "Google", "Google", "Bing", "Facebook", "TikTok", "X", "LinkedIn"];
        let pages = Pages::new(PageSettings::default()).unwrap();
        for (id, want) in CLICK_IDS.into_iter().zip(wanted) {
            let url = format!("https://page.example/?{id}=x");
            let input = PageInput { url: Some(url.into()), ..PageInput::default() };
            assert_eq!(pages.find(&input).source.as_deref(), Some(want), "{id}");
        }
    }
}
