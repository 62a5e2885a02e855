//! Every file that a configuration names, read for the pure step that follows.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::client::asn::AsnDatabase;
use crate::client::city::CityDatabase;
use crate::client::country::CountryDatabase;
use crate::client::place::Databases;
use crate::config::problem::KeyPath;
use crate::config::units::{Country, HostPattern, Network};
use crate::config::{self, Config, Fingerprint, Input, Paths, Problem};
use crate::key_path;
use crate::listeners::Certificate;
use crate::lists::ranges::IpRange;
use crate::lists::{Told, file};
use crate::regions::Identity;
use crate::snapshot::Resources;

/// A database and the file it was read from.
type Read<T> = Option<(Fingerprint, Arc<T>)>;

/// Databases and the files they were read from: one that has not changed is not read again.
#[derive(Debug, Clone, Default)]
pub struct Known {
    countries: Read<CountryDatabase>,
    cities: Read<CityDatabase>,
    systems: Read<AsnDatabase>,
    lists: KnownLists,
    certificates: KnownCertificates,
    /// When the next entry of a list expires.
    pub expires: Option<SystemTime>,
}

/// By file and list: one file may be read in two ways.
type KnownLists = HashMap<(PathBuf, String), KnownList>;

/// Certificates for clients, by the files that they were read from.
pub(super) type KnownCertificates = HashMap<config::Certificate, Arc<Certificate>>;

/// What a list's file told last.
#[derive(Debug, Clone)]
struct KnownList {
    seen: Option<Fingerprint>,
    told: Arc<Told>,
    /// When the next of its entries expires.
    expires: Option<SystemTime>,
}

/// What a list is of, and where it is.
enum Kind<'a> {
    Ip(&'a config::Source<Network>),
    Country(&'a config::Source<Country>),
    Asn(&'a config::Source<u32>),
    Host(&'a config::Source<HostPattern>),
}

/// What a file told.
struct Parsed {
    told: Told,
    /// Lines that could be read, in force or not.
    lines: usize,
    skipped: usize,
    expires: Option<SystemTime>,
}

impl Kind<'_> {
    fn file(&self) -> Option<&Path> {
        fn file<T>(source: &config::Source<T>) -> Option<&Path> {
            match source {
                config::Source::Inline(_) => None,
                config::Source::File(file) => Some(&file.file),
            }
        }
        match self {
            Self::Ip(source) => file(source),
            Self::Country(source) => file(source),
            Self::Asn(source) => file(source),
            Self::Host(source) => file(source),
        }
    }

    fn inline(&self) -> Option<Told> {
        Some(match self {
            Self::Ip(config::Source::Inline(all)) => Told::Ip(all.iter().map(|n| (IpRange::from(n.0), None)).collect()),
            Self::Country(config::Source::Inline(all)) => Told::Country(all.iter().map(ToString::to_string).collect()),
            Self::Asn(config::Source::Inline(all)) => Told::Asn(all.iter().copied().map(i64::from).collect()),
            Self::Host(config::Source::Inline(all)) => Told::Host(all.clone()),
            _ => return None,
        })
    }

    fn parse(&self, text: &str, now: SystemTime) -> Result<Parsed, String> {
        fn all<T>(lines: file::Lines<T>, told: impl FnOnce(Vec<T>) -> Told) -> Parsed {
            let (n, skipped) = (lines.entries.len(), lines.skipped);
            Parsed { told: told(lines.entries), lines: n, skipped, expires: None }
        }
        let number = |line: &str| {
            let word = line.split([' ', '\t', '#', ';', ',']).next().unwrap_or_default();
            word.trim_start_matches("AS").parse::<u32>().ok().map(i64::from)
        };
        Ok(match self {
            Self::Ip(_) => {
                let file::Lines { entries, skipped } = file::addresses(text)?;
                let current = || entries.iter().filter(|entry| file::in_force(entry, now));
                let told = Told::Ip(current().map(|e| (e.range, e.score)).collect());
                let expires = current().filter_map(|e| e.expires).min().map(|at| UNIX_EPOCH + at);
                Parsed { told, lines: entries.len(), skipped, expires }
            }
            Self::Country(_) => {
                all(file::lines(text, |line| line.parse::<Country>().ok().map(|c| c.to_string()))?, Told::Country)
            }
            Self::Asn(_) => all(file::lines(text, number)?, Told::Asn),
            Self::Host(_) => all(file::lines(text, |line| line.parse().ok())?, Told::Host),
        })
    }
}

#[derive(Default)]
pub(super) struct Gathered {
    pub resources: Resources,
    pub inputs: Vec<Input>,
    pub problems: Vec<Problem>,
    pub hasher: DefaultHasher,
}

impl Gathered {
    /// Reads every file that `config` names. What was known and has not changed is not read again.
    pub fn everything(&mut self, at: &Paths, config: &Config, known: &Known) -> Known {
        let client = &config.client;
        let country = key_path!["client", "country_database"];
        let new = CountryDatabase::new;
        let countries =
            self.database(at, client.country_database.as_ref(), country, "country", &known.countries, |db| &db.path, new);
        let (city, new) = (key_path!["client", "city_database"], CityDatabase::new);
        let cities = self.database(at, client.city_database.as_ref(), city, "city", &known.cities, |db| &db.path, new);
        let (asn, new) = (key_path!["client", "asn_database"], AsnDatabase::new);
        let systems = self.database(at, client.asn_database.as_ref(), asn, "AS", &known.systems, |db| &db.path, new);
        self.resources.databases = Databases {
            countries: countries.as_ref().map(|(_, db)| db.clone()),
            cities: cities.as_ref().map(|(_, db)| db.clone()),
            systems: systems.as_ref().map(|(_, db)| db.clone()),
        };
        let lists = self.lists(at, config, &known.lists);
        self.certificates(at, config);
        let certificates = self.listeners(at, config, &known.certificates);
        let expires = lists.values().filter_map(|list| list.expires).min();
        Known { countries, cities, systems, lists, certificates, expires }
    }

    /// What every list tells.
    fn lists(&mut self, at: &Paths, config: &Config, known: &KnownLists) -> KnownLists {
        let mut read = HashMap::new();
        for (name, list) in &config.lists {
            let key = key_path!["lists", name];
            let config::List { ip, country, asn, host, reputation: _, verified_bot: _ } = list;
            let (kind, source): (_, Kind<'_>) = match (ip, country, asn, host) {
                (Some(source), ..) => ("ip", Kind::Ip(source)),
                (_, Some(source), ..) => ("country", Kind::Country(source)),
                (_, _, Some(source), _) => ("asn", Kind::Asn(source)),
                (.., Some(source)) => ("host", Kind::Host(source)),
                // The compiler says that it lacks one.
                (None, None, None, None) => continue,
            };
            let told = match source.file() {
                None => source.inline().map(Arc::new),
                Some(file) => self.list(at, &key.join(kind), file, &source, known, &mut read),
            };
            if let Some(told) = told {
                self.resources.lists.insert(name.0.clone(), told);
            }
        }
        read
    }

    /// What a list's file tells. One that cannot be read or understood, or that turned empty, leaves what it told before.
    fn list(
        &mut self,
        paths: &Paths,
        key: &KeyPath,
        file: &Path,
        source: &Kind<'_>,
        known: &KnownLists,
        read: &mut KnownLists,
    ) -> Option<Arc<Told>> {
        let path = paths.resolve(file);
        let input = Input::now(path.clone());
        let seen = input.seen;
        self.inputs.push(input);
        seen.hash(&mut self.hasher);
        let (label, place) = (key.join("file"), (path.clone(), key.to_string()));
        let before = known.get(&place);
        let now = SystemTime::now();
        let same = |k: &&KnownList| k.seen == seen && seen.is_some() && k.expires.is_none_or(|at| at > now);
        if let Some(known) = before.filter(same) {
            known.expires.hash(&mut self.hasher);
            read.insert(place, known.clone());
            return Some(known.told.clone());
        }
        let parsed = read_list(&path).and_then(|text| source.parse(&text, now));
        let wrong = match parsed {
            Ok(Parsed { told, lines, skipped, expires }) if lines > 0 || before.is_none_or(|b| b.told.is_empty()) => {
                if skipped > 0 {
                    let message = format!("{skipped} lines of `{}` cannot be read, and are left out", path.display());
                    self.problems.push(Problem::warning(label.clone(), message));
                }
                if told.is_empty() {
                    let message = format!("the list in `{}` is empty", path.display());
                    self.problems.push(Problem::warning(label, message));
                }
                expires.hash(&mut self.hasher);
                let told = Arc::new(told);
                read.insert(place, KnownList { seen, told: told.clone(), expires });
                return Some(told);
            }
            Ok(_) => "it turned empty".to_owned(),
            Err(error) => error,
        };
        let Some(known) = before else {
            let message = format!("the list in `{}` cannot be used: {wrong}", path.display());
            self.problems.push(Problem::error(label, message).label("this file"));
            return None;
        };
        let entries = known.told.len();
        let message =
            format!("the list in `{}` cannot be used: {wrong}; its last {entries} entries stay in force", path.display());
        tracing::error!(path = %path.display(), error = %wrong, entries, "a list cannot be used; what it held before stays in force");
        self.problems.push(Problem::warning(label, message));
        // As if it had not been seen: the next change is read whatever it is.
        read.insert(place, KnownList { seen: None, expires: None, ..known.clone() });
        Some(known.told.clone())
    }

    /// Reads a database, unless the known one is of the same file.
    #[expect(clippy::too_many_arguments, reason = "two kinds of databases are read in the same way")]
    fn database<T>(
        &mut self,
        paths: &Paths,
        path: Option<&PathBuf>,
        key: KeyPath,
        kind: &str,
        known: &Read<T>,
        path_of: impl FnOnce(&T) -> &PathBuf,
        new: impl FnOnce(PathBuf, Vec<u8>) -> Result<T, String>,
    ) -> Read<T> {
        let path = paths.resolve(path?);
        let input = Input::now(path.clone());
        let fingerprint = input.seen;
        self.inputs.push(input);
        let database = match known.as_ref().filter(|(of, db)| Some(*of) == fingerprint && *path_of(db) == path) {
            Some((_, known)) => Ok(known.clone()),
            None => std::fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| new(path.clone(), bytes)).map(Arc::new),
        };
        match (database, fingerprint) {
            (Ok(database), Some(fingerprint)) => {
                fingerprint.hash(&mut self.hasher);
                Some((fingerprint, database))
            }
            (Ok(_), None) => None,
            (Err(error), _) => {
                let message = format!("the {kind} database `{}` cannot be used: {error}", path.display());
                self.problems.push(Problem::error(key, message).label("this file"));
                None
            }
        }
    }

    /// Authorities, and certificates of ours, of every upstream.
    fn certificates(&mut self, paths: &Paths, config: &Config) {
        for (name, region) in &config.regions {
            for (i, upstream) in region.upstreams.iter().enumerate() {
                let options = upstream.options();
                if let Some(files) = &options.files {
                    self.root(paths, &key_path!["regions", name, "upstreams", i, "files", "root"], &files.root);
                }
                let at = key_path!["regions", name, "upstreams", i, "tls"];
                let config::UpstreamTls { sni: _, ca, cert, key } = options.tls;
                if let Some(ca) = ca
                    && let Some(der) = self.pem(paths, &ca, &at.join("ca"), "authorities", certificates_of)
                {
                    self.resources.authorities.insert(ca, der.into());
                }
                if let (Some(cert), Some(key)) = (cert, key) {
                    let chain = self.pem(paths, &cert, &at.join("cert"), "certificate", certificates_of);
                    let private = self.pem(paths, &key, &at.join("key"), "key", private_key);
                    if let (Some(chain), Some(private)) = (chain, private) {
                        match identity(chain, private) {
                            Ok(identity) => drop(self.resources.identities.insert((cert, key), Arc::new(identity))),
                            Err(error) => self.problems.push(Problem::error(at.join("key"), error).label("this file")),
                        }
                    }
                }
            }
        }
    }

    /// A folder of files, by its whole name. Links stay links: a new release takes the place of the old one by one.
    fn root(&mut self, paths: &Paths, at: &KeyPath, root: &Path) {
        let path = paths.resolve(root);
        let found = std::path::absolute(&path).and_then(|path| match path.is_dir() {
            true => Ok(path),
            false => Err(std::fs::metadata(&path).err().unwrap_or(std::io::ErrorKind::NotADirectory.into())),
        });
        match found {
            Ok(found) => {
                found.hash(&mut self.hasher);
                self.resources.roots.insert(root.to_owned(), found);
            }
            Err(error) => {
                let message = format!("the folder `{}` cannot be used: {error}", path.display());
                self.problems.push(Problem::error(at.clone(), message).label("this folder"));
            }
        }
    }

    pub(super) fn pem<T: Hash>(
        &mut self,
        paths: &Paths,
        path: &Path,
        at: &KeyPath,
        what: &str,
        read: impl FnOnce(&Path) -> Result<T, String>,
    ) -> Option<T> {
        let path = paths.resolve(path);
        self.inputs.push(Input::now(path.clone()));
        match read(&path) {
            Ok(found) => {
                found.hash(&mut self.hasher);
                Some(found)
            }
            Err(error) => {
                let message = format!("the {what} in `{}` cannot be used: {error}", path.display());
                self.problems.push(Problem::error(at.clone(), message).label("this file"));
                None
            }
        }
    }
}

/// The certificates of a PEM file, each known to parse.
pub(super) fn certificates_of(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let all = CertificateDer::pem_file_iter(path).map_err(|e| e.to_string())?;
    let all: Vec<Vec<u8>> = all.map(|c| c.map(|c| c.to_vec())).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if all.is_empty() {
        return Err("there is no certificate in it".to_owned());
    }
    for der in &all {
        x509_parser::parse_x509_certificate(der).map_err(|e| e.to_string())?;
    }
    Ok(all)
}

/// The private key of a PEM file, in DER.
fn private_key(path: &Path) -> Result<Vec<u8>, String> {
    let key = PrivateKeyDer::from_pem_file(path).map_err(|e| e.to_string())?;
    Ok(key.secret_der().to_vec())
}

/// A certificate and its key, known to belong together.
fn identity(chain: Vec<Vec<u8>>, key: Vec<u8>) -> Result<Identity, String> {
    crate::proxy::check_identity(&chain, &key)?;
    Ok(Identity { chain, key })
}

/// The text of a list's file.
fn read_list(path: &Path) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > file::MAX_FILE {
        return Err(format!("it is larger than {} MiB", file::MAX_FILE >> 20));
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
}
