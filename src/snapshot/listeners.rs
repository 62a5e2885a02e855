//! Where clients connect, from what was typed and read to what can run.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};

use super::Compiler;
use crate::config;
use crate::config::problem::{KeyPath, Problem};
use crate::config::units::Network;
use crate::key_path;
use crate::listeners::acme::{Acme, PROTOCOL};
use crate::listeners::{Certificates, Listener, Tls};

/// What is spoken inside, the better first (RFC 7301).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

impl Compiler<'_> {
    pub(super) fn listeners(&mut self, listeners: &[config::Listener], trusted: &[Network]) -> Box<[Listener]> {
        let each = listeners.iter().enumerate().map(|(i, listener)| {
            let config::Listener { address, tls, proxy_protocol } = listener;
            if *proxy_protocol && trusted.is_empty() {
                let at = key_path!["listeners", i, "proxy_protocol"];
                let problem = Problem::error(at, "nobody is trusted to say who connects");
                self.problems.push(problem.hint("name the proxies in `client.trusted_proxies`"));
            }
            let at = key_path!["listeners", i, "tls"];
            let acme = self.resources.acme.get(&i).cloned();
            let tls = tls.as_ref().and_then(|tls| self.tls(&at, &address.0.to_string(), tls, acme));
            Listener { tls, introduced: *proxy_protocol }
        });
        each.collect()
    }

    /// Nothing, where something is missing that was told of already.
    fn tls(&mut self, at: &KeyPath, address: &str, tls: &config::Tls, acme: Option<Arc<Acme>>) -> Option<Tls> {
        let config::Tls { certificates, acme: asked, profile, client_auth } = tls;
        if certificates.is_empty() && asked.is_none() {
            let problem = Problem::error(at.join("certificates"), "there is no certificate");
            self.problems.push(problem.hint("name files under `certificates`, or let them be got with `acme`"));
            return None;
        }
        if asked.is_some() {
            self.proven(&at.join("acme"), client_auth.as_ref(), acme.as_deref());
        }
        let read = certificates.iter().map(|one| self.resources.certificates.get(one).cloned());
        let mut all = read.collect::<Option<Vec<_>>>()?;
        // Those that have not come yet are shown once they have.
        if let Some(acme) = &acme {
            let got = acme.names.iter().filter_map(|name| self.resources.certificates.get(&acme.certificate(name)));
            all.extend(got.cloned());
        }
        let challenges = acme.is_some().then(|| self.memory.acme.clone());
        let certificates = Arc::new(Certificates::new(all, challenges));
        let mut roots = None;
        if let Some(config::ClientAuth { ca, optional }) = client_auth {
            let authorities = self.resources.authorities.get(ca)?;
            let mut store = RootCertStore::empty();
            let (_, ignored) = store.add_parsable_certificates(authorities.iter().map(|der| der.clone().into()));
            if ignored > 0 || store.is_empty() {
                self.error(at.join("client_auth").join("ca"), format!("{ignored} certificates in it are no authorities"));
                return None;
            }
            roots = Some((Arc::new(store), *optional));
        }
        let provider = Arc::new(default_provider());
        let versions: &[_] = match profile {
            config::Profile::Intermediate => &[&TLS13, &TLS12],
            config::Profile::Modern => &[&TLS13],
        };
        // A session that is taken up again is not asked for its certificate: one that expired would go on for ever.
        let tickets = client_auth.is_none().then(|| self.memory.tickets(address));
        let build = || -> Result<ServerConfig, String> {
            let builder = ServerConfig::builder_with_provider(provider.clone());
            let builder = builder.with_protocol_versions(versions).map_err(|error| error.to_string())?;
            let builder = match roots {
                None => builder.with_no_client_auth(),
                Some((roots, optional)) => {
                    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                    let verifier = if optional { verifier.allow_unauthenticated() } else { verifier };
                    builder.with_client_cert_verifier(verifier.build().map_err(|error| error.to_string())?)
                }
            };
            let mut config = builder.with_cert_resolver(certificates.clone());
            config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
            config.alpn_protocols.extend(acme.as_ref().map(|_| PROTOCOL.to_vec()));
            match &tickets {
                Some(tickets) => {
                    config.session_storage = tickets.sessions.clone();
                    if let Some(ticketer) = &tickets.ticketer {
                        config.ticketer = ticketer.clone();
                    }
                }
                None => {
                    config.session_storage = Arc::new(NoServerSessionStorage {});
                    config.send_tls13_tickets = 0;
                }
            }
            Ok(config)
        };
        match build() {
            Ok(config) => Some(Tls { config: Arc::new(config), certificates, acme }),
            Err(error) => {
                self.error(at.clone(), error);
                None
            }
        }
    }

    /// Can it work?
    fn proven(&mut self, at: &KeyPath, client_auth: Option<&config::ClientAuth>, acme: Option<&Acme>) {
        let Some(acme) = acme else {
            let problem = Problem::error(at.clone(), "there is no folder for what is got");
            return self.problems.push(problem.hint("set `storage`, or `state_dir`"));
        };
        if acme.names.is_empty() {
            let problem = Problem::error(at.clone(), "there is no name to get a certificate for");
            self.problems.push(problem.hint("list `names`, or give routes `hosts`; wildcards cannot be proven"));
        }
        if !acme.directory.starts_with("https://") {
            self.error(at.join("directory"), "expected a URL that begins with `https://`");
        }
        if client_auth.is_some_and(|auth| !auth.optional) {
            let message = "authorities show no certificate of their own, so names are proven over HTTP alone";
            self.problems.push(Problem::warning(at.clone(), message).hint("have a listener without TLS on port 80"));
        }
    }
}
