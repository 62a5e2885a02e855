//! The page that a browser gets: it works and then comes back by itself.

use std::fmt::Write;
use std::sync::LazyLock;

use serde_json::{Map, Value as Json};

use super::{PATH, WAIT};
use crate::request::accepted;

const PAGE: &str = include_str!("page.html");

/// Languages and their texts.
static TEXTS: LazyLock<Map<String, Json>> =
    LazyLock::new(|| serde_json::from_str(include_str!("texts.json")).unwrap_or_default());

/// What a page is made from.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a> {
    /// The client's `Accept-Language` headers.
    pub languages: &'a [&'a str],
    /// The host that it asked for.
    pub host: &'a str,
    /// The request's name.
    pub request_id: &'a str,
    /// The challenge.
    pub token: &'a str,
    /// Zero bits.
    pub bits: u8,
    /// Where somebody without JavaScript comes back to, if they may.
    pub back: Option<&'a str>,
    /// Allows the page's own script and style (CSP).
    pub nonce: &'a str,
}

/// `Content-Security-Policy` of the page.
pub fn policy(nonce: &str) -> String {
    format!(
        "default-src 'none'; script-src 'nonce-{nonce}' blob:; worker-src blob:; style-src 'nonce-{nonce}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

/// The language of a page, of those that there are.
pub fn language(languages: &[&str]) -> &'static str {
    let known = |tag: &str| {
        let primary = tag.split('-').next().unwrap_or_default().to_ascii_lowercase();
        TEXTS.keys().find(|known| **known == primary).map(String::as_str)
    };
    accepted(languages.iter().copied()).find_map(|(tag, _)| known(tag)).unwrap_or("en")
}

impl Page<'_> {
    /// The page.
    pub fn render(&self) -> String {
        let language = language(self.languages);
        let texts = TEXTS.get(language);
        let text = |key: &str| texts.and_then(|t| t.get(key)).and_then(Json::as_str).unwrap_or_default();
        let bits = self.bits.to_string();
        let (mut head, mut block) = (String::new(), String::new());
        if let Some(back) = self.back {
            let link = format!("{PATH}?t={}&to={}", self.token, encoded(back));
            let (link, nojs, label) = (escaped(&link), escaped(text("nojs")), escaped(text("nojs_link")));
            // A second more than is asked for: clocks are read in whole seconds.
            let seconds = WAIT.as_secs() + 1;
            head = format!("<noscript><meta http-equiv=\"refresh\" content=\"{seconds}; url={link}\"></noscript>");
            block = format!("<noscript><div class=\"nojs\"><p>{nojs}</p><a href=\"{link}\">{label}</a></div></noscript>");
        }
        let mut page = String::with_capacity(PAGE.len() + 2048);
        let mut rest = PAGE;
        while let Some((before, behind)) = rest.split_once("{{") {
            page.push_str(before);
            let Some((name, after)) = behind.split_once("}}") else { break };
            match name {
                "lang" => page.push_str(language),
                "dir" => page.push_str(if language == "ar" { "rtl" } else { "ltr" }),
                "nojs_head" => page.push_str(&head),
                "nojs_block" => page.push_str(&block),
                "nonce" => page.push_str(&escaped(self.nonce)),
                "host" => page.push_str(&escaped(self.host)),
                "request_id" => page.push_str(&escaped(self.request_id)),
                "token" => page.push_str(&escaped(self.token)),
                "bits" => page.push_str(&bits),
                key => page.push_str(&escaped(text(key))),
            }
            rest = after;
        }
        page.push_str(rest);
        page
    }
}

/// As text or a quoted attribute of HTML.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

/// As the value of a query argument.
fn encoded(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            true => safe.push(char::from(byte)),
            // Writing to memory cannot fail.
            false => drop(write!(safe, "%{byte:02X}")),
        }
    }
    safe
}

/// Where somebody who waited goes back to: a path of this very site, or its root.
pub fn back(to: &str) -> &str {
    let local = to.starts_with('/') && !to.starts_with("//") && to.bytes().all(|b| b.is_ascii_graphic() && b != b'\\');
    if local { to } else { "/" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_languages_with_every_text() {
        assert_eq!(TEXTS.len(), 10);
        let keys =
            |language: &str| TEXTS[language].as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>();
        for language in TEXTS.keys() {
            assert_eq!(keys(language), keys("en"), "{language}");
            let page = page(&[language.as_str()], "a.example");
            assert!(page.contains(&format!("lang=\"{language}\"")), "{language}");
            for name in PAGE.split("{{").skip(1).filter_map(|p| p.split("}}").next()) {
                assert!(!page.contains(&format!("{{{{{name}}}}}")), "{language} {name}");
            }
        }
        assert_eq!([language(&["xx, de-CH;q=0.5, fr;q=0.7"]), language(&[]), language(&["zh-Hant"])], ["fr", "en", "zh"]);
    }

    fn page(languages: &[&str], host: &str) -> String {
        Page { languages, host, request_id: "id", token: "T.1", bits: 16, back: Some("/x?a=1&b='\"<"), nonce: "N" }.render()
    }

    #[test]
    fn nothing_of_the_request_becomes_markup() {
        let page = page(&["en"], "a<b>\"{{token}}");
        assert!(page.contains("a&lt;b&gt;&quot;{{token}}"), "and nothing in it is a placeholder");
        assert!(page.contains("/.portolan/challenge?t=T.1&amp;to=/x%3Fa%3D1%26b%3D%27%22%3C"));
        let closed = Page { languages: &[], host: "h", request_id: "i", token: "t", bits: 1, back: None, nonce: "n" }.render();
        assert!(!closed.contains("http-equiv=\"refresh\""));
    }

    #[test]
    fn nobody_is_sent_away() {
        for (to, safe) in [
            ("/a?b=c", "/a?b=c"),
            ("//evil.example", "/"),
            ("/\\evil.example", "/"),
            ("https://x", "/"),
            ("", "/"),
            ("/a b", "/"),
        ] {
            assert_eq!(back(to), safe);
        }
    }
}
