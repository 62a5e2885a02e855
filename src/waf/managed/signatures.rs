//! The signatures of the managed ruleset: words that make an input suspicious, and a pattern that settles it.
//!
//! Inputs arrive decoded and in lower case. A pattern that begins with `^\S*` wants a value that is one token, as a
//! path or an address is and prose is not; that is what lets an article about an attack pass where the attack does not.
//! Programs are posted to honest sites, so what looks like code counts at `Low` only outside bodies or at a value's start.

use super::{Category::*, Sensitivity::*, Signature, Targets};

/// What a request says before its body.
pub(super) const HEAD: Targets =
    Targets::PATH.and(Targets::QUERY).and(Targets::COOKIE).and(Targets::AGENT).and(Targets::REFERER).and(Targets::HEADER);

/// What an application takes for data.
pub(super) const VALUES: Targets = Targets::QUERY.and(Targets::COOKIE).and(Targets::BODY);

/// The first half: files, code, templates, lookups; by category and level.
pub const SIGNATURES: &[Signature] = &[
    Signature {
        id: "traversal-password-file",
        category: Traversal,
        level: Low,
        reason: "A value names a file of passwords of a Unix system (CWE-22)",
        targets: Targets::ALL,
        words: &["passwd", "shadow", "sudoers"],
        confirm: Some(r"^\S*etc(?:[/\\.]|%(?:25)*(?:2f|5c))+(?:passwd|g?shadow|master\.passwd|sudoers)-?(?:[^a-z0-9_\s-]\S*)?\s*$"),
    },
    Signature {
        id: "traversal-proc",
        category: Traversal,
        level: Low,
        reason: "A value names a process's memory, environment or files (CWE-22)",
        targets: Targets::ALL,
        words: &["proc/"],
        confirm: Some(r"^\S*/proc/+(?:self|thread-self|[0-9]{1,7})/+(?:environ|cmdline|maps|mem|fd|cwd|root|exe|status)(?:\W\S*)?$"),
    },
    Signature {
        id: "traversal-target",
        category: Traversal,
        level: Low,
        reason: "A path climbs out of its folder towards a system or secret file (CWE-22)",
        targets: Targets::PATH.and(VALUES).and(Targets::HEADER),
        words: &["../", "..\\"],
        confirm: Some(concat!(
            r"^\S*\.\.[/\\]\S*(?:\betc[/\\]|\bproc[/\\]|windows[/\\]|winnt[/\\]|win\.ini|boot\.ini|web-inf|wp-config|",
            r"\.ssh[/\\]|\.aws[/\\]|\.htpasswd|var[/\\]log|web\.config|\.git[/\\])",
        )),
    },
    Signature {
        id: "traversal-climb",
        category: Traversal,
        level: Low,
        reason: "A path climbs three folders or more (CWE-22)",
        targets: Targets::PATH.and(Targets::QUERY).and(Targets::COOKIE),
        words: &["../", "..\\"],
        confirm: Some(r"(?:^|[^a-z0-9_.])\.{2,4}[/\\]+(?:\.[/\\]+)?\.{2,4}[/\\]+(?:\.[/\\]+)?\.{2,4}(?:[/\\]|$)"),
    },
    Signature {
        id: "traversal-encoded",
        category: Traversal,
        level: Low,
        reason: "A climb is encoded to escape notice (CWE-22, CVE-2021-41773)",
        targets: Targets::PATH.and(Targets::QUERY),
        words: &["%2e%2e", "..%", "%252e", "%2e.", ".%2e", "%c0%a", "%uff0e", "%u002e"],
        confirm: Some(concat!(
            r"(?:\.|%(?:25)*(?:2e|c0%ae)|%u(?:ff0e|002e)){2}(?:[\\/]|%(?:25)*(?:2f|5c|c0%af)|%u(?:2215|2216|002f))",
            r"|[/\\.]%c0%af",
        )),
    },
    Signature {
        id: "traversal-path-parameter",
        category: Traversal,
        level: Low,
        reason: "A path parameter hides a climb from a proxy (CWE-22, CVE-2020-5902)",
        targets: Targets::PATH,
        words: &["..;/", "/..;", "..%3b", ";/../", "/;/"],
        confirm: Some(r"/\.\.(?:;|%3b)|;/\.\./|/;/(?:\.\.|wls|web-inf)"),
    },
    Signature {
        id: "traversal-windows",
        category: Traversal,
        level: Low,
        reason: "A value names a system file of Windows (CWE-22)",
        targets: HEAD,
        words: &["win.ini", "boot.ini", "system.ini", "system32", "\\windows\\", "inetpub"],
        confirm: Some(concat!(
            r"^(?:\S*\.\.[/\\]\S*|(?:file:/+)?(?:[a-z]:|%[a-z]+%)?[/\\]+)(?:boot\.ini|(?:windows|winnt)[/\\]+",
            r"(?:win\.ini|system\.ini|system32[/\\]+(?:config|drivers|inetsrv|cmd))|inetpub[/\\]+\S+\.config)",
        )),
    },
    Signature {
        id: "traversal-wrapper",
        category: Traversal,
        level: Low,
        reason: "A stream wrapper of PHP where a file name belongs (CWE-98)",
        targets: VALUES,
        words: &["php://", "phar://", "expect://", "zip://", "zlib://", "data://", "glob://", "ogg://"],
        confirm: Some(r"^\s*(?:php:/+(?:filter|input|fd|stdin|memory|temp)|(?:phar|expect|zip|compress\.zlib|data|glob|ogg):/+\S)"),
    },
    Signature {
        id: "traversal-java",
        category: Traversal,
        level: Low,
        reason: "The private folder of a Java application is asked for (CWE-552)",
        targets: Targets::PATH.and(Targets::QUERY),
        words: &["web-inf", "meta-inf"],
        confirm: Some(r"^(?:\.|/|file:|https?:)\S*?(?:web-inf(?:[/\\]|%2f)|meta-inf[/\\](?:context\.xml|persistence\.xml|manifest\.mf$))"),
    },
    Signature {
        id: "traversal-key-file",
        category: Traversal,
        level: Low,
        reason: "A value names a private key or the credentials of a person (CWE-22)",
        targets: Targets::QUERY.and(Targets::COOKIE),
        words: &["ssh/", "aws/", "kube/", "docker/", "gnupg/", "_history", "/.env"],
        confirm: Some(
            r"^[./~\\a-z]\S*(?:\.(?:ssh|aws|gnupg|kube|docker)/(?:id_[a-z0-9]+|authorized_keys|credentials|config)|\.\w+_history|\.\./\.env)",
        ),
    },
    Signature {
        id: "traversal-log-file",
        category: Traversal,
        level: Medium,
        reason: "A value names a log, which an attacker can fill with code (CWE-22)",
        targets: Targets::QUERY.and(Targets::COOKIE),
        words: &["/log/", "/logs/", "_log"],
        confirm: Some(r"^(?:/|\.\.)\S*/(?:var/log/|logs?/(?:access|error)|access_log|error_log)"),
    },
    Signature {
        id: "traversal-climb-two",
        category: Traversal,
        level: Medium,
        reason: "A path climbs two folders (CWE-22)",
        targets: Targets::PATH.and(Targets::QUERY).and(Targets::COOKIE),
        words: &["../", "..\\"],
        confirm: Some(r"(?:^|[/\\=])\.\.[/\\]+\.\.(?:[/\\]|$)"),
    },
    Signature {
        id: "traversal-climb-one",
        category: Traversal,
        level: High,
        reason: "A path climbs a folder (CWE-22)",
        targets: Targets::PATH.and(Targets::QUERY).and(Targets::COOKIE),
        words: &["/..", "\\..", "../", "..\\"],
        confirm: Some(r"(?:^|[/\\=])\.\.(?:[/\\]|$)"),
    },
    Signature {
        id: "rce-shell-command",
        category: Rce,
        level: Low,
        reason: "A value ends and a shell command begins (CWE-78)",
        targets: Targets::ALL,
        words: &[";", "|", "&"],
        confirm: None,
    },
];
