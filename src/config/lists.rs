//! Named lists.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units::{Country, HostPattern, Network};

/// One list: of addresses, countries, AS numbers or hosts; exactly one of these.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// Addresses and networks, or a file of them.
    #[serde(default)]
    pub ip: Option<Source<Network>>,
    /// Countries by their codes, or a file of them.
    #[serde(default)]
    pub country: Option<Source<Country>>,
    /// Numbers of autonomous systems, or a file of them.
    #[serde(default)]
    pub asn: Option<Source<u32>>,
    /// Hosts, or a file of them.
    #[serde(default)]
    pub host: Option<Source<HostPattern>>,
    /// What an address in it adds to `cf.threat_score`, unless its line in the file has a score of its own.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100))]
    pub reputation: Option<u8>,
    /// Its addresses are of a robot that its owner vouches for, of this category (`cf.verified_bot_category`).
    #[serde(default)]
    pub verified_bot: Option<String>,
}

/// Entries, or where to read them.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Source<T> {
    /// Here.
    Inline(Vec<T>),
    /// In a file, which is watched.
    File(File),
}

/// A file of entries.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The file: one entry a line, `#` and `;` begin comments; for `ip` also JSON as Spamhaus and Google write it.
    pub file: PathBuf,
}
