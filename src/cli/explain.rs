//! `portolan explain`: a request's journey, without the journey.

use std::net::IpAddr;

use clap::Args;

use super::{ConfigArgs, Exit, print, print_problems};
use crate::config;
use crate::explain::{Question, ResponseAsked, explain};
use crate::memory::Memory;
use crate::reload::{Known, build};
use crate::request::Moment;
use crate::signing::Key;
use crate::tasks::dns::Resolver;

#[derive(Debug, Args)]
pub struct Explain {
    #[command(flatten)]
    config: ConfigArgs,
    /// The address that connects
    #[arg(long)]
    ip: IpAddr,
    /// The method
    #[arg(long, short, default_value = "GET")]
    method: String,
    /// A request header, as in curl; may be given several times
    #[arg(short = 'H', long = "header", value_name = "K: V", value_parser = header)]
    headers: Vec<(String, String)>,
    /// A request body, for rules that look at it
    #[arg(long, short = 'd', value_name = "TEXT")]
    data: Option<String>,
    /// A header of the origin's response, as in curl; may be given several times: may the cache store it?
    #[arg(long, value_name = "K: V", value_parser = header)]
    response: Vec<(String, String)>,
    /// The status of the origin's response
    #[arg(long, value_name = "N")]
    response_status: Option<u16>,
    /// Take this region for unreachable; may be given several times
    #[arg(long, value_name = "REGION")]
    down: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// http://host/path, or a path
    url: String,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected `Name: value`")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

impl Explain {
    pub fn run(self) -> anyhow::Result<Exit> {
        let Self { config, ip, method, headers, data, response, response_status, down, json, url } = self;
        let paths = config.paths();
        // With `secret` in the configuration cookies that a running process signed can be understood.
        let secret = config::load(&paths).ok().and_then(|loaded| loaded.config.secret);
        let memory = Memory::new(Key::new(secret.as_ref().map_or("explain", |s| s.reveal()).as_bytes()));
        let built = build(&paths, &Known::default(), &memory);
        let built = match built {
            Ok(built) => built,
            Err(failed) => {
                print_problems(&failed.problems);
                return Ok(Exit::User);
            }
        };
        // A name without an address would never be tried, so it has to be known before telling.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let resolver = Resolver::new(built.config.resolver.servers.iter().map(|a| a.0).collect());
        runtime.block_on(resolver.resolve_new(&memory.upstreams()));
        let told = response_status.is_some() || !response.is_empty();
        let response = told.then(|| ResponseAsked { status: response_status.unwrap_or(200), headers: response });
        let question = Question { ip, method, url, headers, body: data, down, response };
        match explain(&built.snapshot, &question, Moment::default()) {
            Ok(explanation) if json => print(&serde_json::to_string_pretty(&explanation)?),
            Ok(explanation) => print(explanation.to_string().trim_end()),
            Err(error) => {
                eprintln!("error: {error}");
                return Ok(Exit::User);
            }
        }
        Ok(Exit::Done)
    }
}
