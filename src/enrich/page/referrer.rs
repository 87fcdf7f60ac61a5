//! Who led somebody to a page: the host that the browser names, unless it is one's own.

use std::borrow::Cow;

use serde::Serialize;

use super::{
    address::{Address, after, cut, is_printable, push_printable, trimmed},
    host,
};

/// What an app of Android calls itself before its name.
pub(super) const APP: &str = "android-app://";
/// Most bytes of host and path.
const BYTES_MAX: usize = 2_000;

/// Where somebody came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Referrer<'a> {
    /// Lower case, without `www.`; an app's name with `android-app://` before it.
    pub host: Cow<'a, str>,
    /// As it was sent, without what is behind it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub path: Cow<'a, str>,
}

impl<'a> Referrer<'a> {
    /// Of what a browser says, or a caller for it; nothing if that is nothing, no address of
    /// the web, or one of our own. One without a host is the page's own host's.
    pub(super) fn of(text: &'a str, page_host: Option<&str>, sites: &[String]) -> Option<Self> {
        let text = trimmed(text);
        if let Some(app) = after(text, APP) {
            return Self::of_app(app);
        }
        let address = match text.strip_prefix("//") {
            Some(rest) => Address::of_rest("https", rest)?,
            None => Address::of(text)?,
        };
        if is_own(&address.host, page_host, sites) {
            return None;
        }
        let host = match address.host {
            Cow::Borrowed(host) => Cow::Borrowed(host::without_www(host)),
            Cow::Owned(host) => host::without_www(&host).to_owned().into(),
        };
        let path = printable(cut(address.path, BYTES_MAX - host.len()));
        Some(Self { host, path })
    }

    fn of_app(app: &'a str) -> Option<Self> {
        let end = app.find(['/', '?', '#']).unwrap_or(app.len());
        let (name, path) = app.split_at(end);
        let is_of_it = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(is_of_it) {
            return None;
        }
        let host = format!("{APP}{}", name.to_ascii_lowercase());
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let path = printable(cut(path, BYTES_MAX - host.len()));
        Some(Self { host: host.into(), path })
    }
}

/// True for a host of the same site, of one that the operator names, and of this machine.
fn is_own(host: &str, page_host: Option<&str>, sites: &[String]) -> bool {
    page_host.is_some_and(|page| host::is_same_site(host, page))
        || sites.iter().any(|site| host::is_of(host, site))
        || host::is_localhost(host)
}

fn printable(text: &str) -> Cow<'_, str> {
    if is_printable(text) {
        return text.into();
    }
    let mut clean = String::new();
    push_printable(&mut clean, text);
    clean.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, page_host: Option<&str>) -> Option<String> {
        let sites = ["shop.example".to_owned(), "checkout.pay.example".to_owned()];
        let Referrer { host, path } = Referrer::of(text, page_host, &sites)?;
        Some(format!("{host} {path}"))
    }

    #[test]
    fn a_referrer_is_its_host_and_path() {
        for (text, want) in [
            ("https://www.Google.com/", "google.com /"),
            ("https://google.com", "google.com /"),
            ("http://a:b@news.example:81/x/?q=secret#y", "news.example /x/"),
            ("//news.example/x", "news.example /x"),
            ("https://bücher.example/é", "xn--bcher-kva.example /é"),
            ("https://www.com/", "www.com /"),
            ("android-app://com.Google.android.gm/", "android-app://com.google.android.gm /"),
            ("ANDROID-APP://org.x?y", "android-app://org.x "),
            ("https://x.example/a\u{1}b", "x.example /ab"),
        ] {
            assert_eq!(of(text, Some("page.example")).as_deref(), Some(want), "{text}");
        }
    }

    #[test]
    fn ones_own_pages_led_nobody() {
        for text in [
            "https://page.example/x",
            "https://www.page.example/",
            "https://blog.page.example/",
            "/pricing",
            "pricing",
            "?x",
            "https://shop.example/",
            "https://www.shop.example/",
            "https://checkout.pay.example/",
            "http://localhost:3000/",
            "http://127.0.0.1/",
            "http://[::1]:80/",
        ] {
            assert_eq!(of(text, Some("page.example")), None, "{text}");
        }
        for text in ["https://notpage.example/", "https://pay.example/", "https://notshop.example/"] {
            assert!(of(text, Some("page.example")).is_some(), "{text}");
        }
        assert!(of("https://page.example/", None).is_some(), "nobody knows that it is");
    }

    #[test]
    fn what_is_no_address_is_none() {
        for text in [
            "",
            " ",
            "about:client",
            "file:///x",
            "chrome-extension://x/",
            "https://",
            "android-app://",
            "android-app:///x",
            "android-app://a b",
            "null",
            "$direct",
            "ios-app://1/x",
        ] {
            assert_eq!(of(text, None), None, "{text}");
        }
    }

    #[test]
    fn a_path_of_any_length_is_cut() {
        for start in ["https://x.example/", "android-app://x.y/"] {
            let text = format!("{start}{}", "é".repeat(5_000));
            let referrer = Referrer::of(&text, None, &[]).unwrap();
            assert!((BYTES_MAX - 1..=BYTES_MAX).contains(&(referrer.host.len() + referrer.path.len())));
        }
    }
}
