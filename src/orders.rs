//! What operators order for regions: evacuate, drain, restore. Orders survive reloads in memory and restarts
//! in `state_dir`, and each is one line in the log.
//!
//! Evacuation is modelled on the zonal shift of AWS's Application Recovery Controller: it always ends by
//! itself, it is refused where it would leave nobody to serve, and traffic leaves and comes back in a ramp.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use event_listener::Event;
use parking_lot::Mutex;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::config::units::Span;
use crate::kept::{Now, replace, rfc3339};
use crate::memory::Memory;
use crate::proxy::clock;
use crate::regions::RegionId;
use crate::regions::control::{Control, Kind};
use crate::request::Moment;
use crate::snapshot::Snapshot;
use crate::state::State;

/// An evacuation lasts at least this long,
const SHORTEST: Duration = Duration::from_secs(60);
/// and at most this long.
const LONGEST: Duration = Duration::from_secs(72 * 3600);
/// What takes longer to leave is no evacuation.
const LONGEST_RAMP: Duration = Duration::from_secs(3600);
/// Clocks of nodes differ by less than this.
const AHEAD: Duration = Duration::from_secs(3600);
/// Reasons are cut after so many characters.
const REASON: usize = 500;
const FILE: &str = "regions.json";
const SECRET: &str = "secret";

/// Where orders are kept.
#[derive(Debug)]
pub struct Orders {
    dir: Option<PathBuf>,
    /// One change at a time. Inside: when the last order for each region was given.
    turn: Mutex<BTreeMap<String, Given>>,
    /// Stands for this process among others.
    node: String,
    /// An order was given here.
    pub changed: Event,
}

/// When an order was given, and by which node: with that no two are equal.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Given {
    /// Milliseconds since 1970.
    pub at: u64,
    /// The node, for as long as its process lives.
    pub node: String,
}

impl Given {
    /// Was it given where clocks are wrong?
    pub fn is_ahead(&self) -> bool {
        self.at > Now::new().unix.saturating_add(AHEAD.as_millis() as u64)
    }
}

/// The last order for a region, as nodes tell it each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamped {
    /// The region.
    pub region: String,
    /// When and where it was given: of two the later holds.
    #[serde(flatten)]
    pub given: Given,
    /// What holds since then; nothing once the region was restored.
    pub order: Option<Kept>,
}

/// The body of `POST /regions/NAME/evacuate`, `drain` and `restore`; what is left out has its default.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// `evacuate`: for how long, from one minute to 72 hours.
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub lasts: Option<String>,
    /// `evacuate`: how long traffic takes to leave, and to come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<String>,
    /// `drain`: how long clients with affinity and WebSockets may stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<String>,
    /// Why, for those who ask later.
    #[serde(default)]
    pub reason: String,
    /// Also where it would leave nobody to serve.
    #[serde(default)]
    pub force: bool,
}

/// Why an order is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No such region.
    #[error("region `{name}` is not defined; defined: {defined}")]
    Unknown {
        /// The name.
        name: String,
        /// Those that are.
        defined: String,
    },
    /// It cannot be understood.
    #[error("{0}")]
    Invalid(String),
    /// It would hurt.
    #[error("{0}")]
    Harmful(String),
    /// It cannot be kept.
    #[error("the order cannot be written to state_dir: {0}")]
    Disk(String),
}

/// An order as it is kept and shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// The region.
    pub region: String,
    /// What was ordered.
    pub kind: Kind,
    /// When it began, in milliseconds since 1970.
    pub from: u64,
    /// The ramp, or the grace, in milliseconds.
    pub ramp: u64,
    /// When it ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until: Option<u64>,
    /// Why.
    pub reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    regions: Vec<Kept>,
    /// When the last order for each region was given.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    given: BTreeMap<String, Given>,
}

impl Kept {
    fn of(region: &str, control: &Control, now: Now) -> Self {
        Self {
            region: region.to_owned(),
            kind: control.kind,
            from: now.unix(control.from),
            ramp: u64::try_from(control.ramp.as_millis()).unwrap_or(u64::MAX),
            until: control.until.map(|until| now.unix(until)),
            reason: control.reason.clone(),
        }
    }
}

impl Orders {
    /// Reads the orders that an earlier process kept in `dir`, and puts those that have not ended in force.
    pub fn open(dir: Option<PathBuf>, memory: &Memory) -> io::Result<Self> {
        let mut given = BTreeMap::new();
        if let Some(dir) = &dir {
            std::fs::create_dir_all(dir)?;
            let text = match std::fs::read_to_string(dir.join(FILE)) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                Err(error) => return Err(error),
            };
            let now = Now::new();
            let saved = match serde_json::from_str::<Saved>(&text) {
                Ok(saved) => {
                    given = saved.given;
                    saved.regions
                }
                Err(_) if text.is_empty() => Vec::new(),
                Err(error) => {
                    // Not to start would be worse than to forget; the file stays for those who want to look.
                    let aside = dir.join(format!("{FILE}.bad"));
                    tracing::error!(%error, file = %aside.display(), "the orders for regions cannot be read and are forgotten");
                    std::fs::rename(dir.join(FILE), aside)?;
                    Vec::new()
                }
            };
            for Kept { region, kind, from, ramp, until, reason } in saved {
                let control = Control {
                    kind,
                    from: now.moment(from),
                    ramp: Duration::from_millis(ramp),
                    until: until.map(|until| now.moment(until)),
                    reason,
                };
                if !control.is_over(now.moment) {
                    tracing::info!(
                        audit = true,
                        region,
                        order = kind.label(),
                        reason = control.reason,
                        "still in force after a restart"
                    );
                    memory.region(&region).control.store(Some(Arc::new(control)));
                }
            }
        }
        let node = format!("{:016x}", fastrand::u64(..));
        Ok(Self { dir, turn: Mutex::new(given), node, changed: Event::new() })
    }

    /// Sends a region's traffic elsewhere, for a set time. Blocks on disk.
    pub fn evacuate(&self, state: &State, name: &str, order: &Order) -> Result<Kept, Refused> {
        let lasts = span("for", order.lasts.as_deref())?.ok_or_else(|| invalid("`for` is missing: an evacuation always ends"))?;
        let ramp = span("ramp", order.ramp.as_deref())?.unwrap_or_default();
        if !(SHORTEST..=LONGEST).contains(&lasts) {
            return Err(invalid("`for` must be from 1m to 72h"));
        }
        if ramp > LONGEST_RAMP || ramp > lasts {
            return Err(invalid("`ramp` must be at most 1h, and no longer than `for`"));
        }
        let now = clock::now();
        let control = |reason| Control { kind: Kind::Evacuated, from: now, ramp, until: Some(now.after(lasts)), reason };
        self.begin(state, name, order, control)
    }

    /// Lets a region take no new clients; those it has may stay for a grace. Blocks on disk.
    pub fn drain(&self, state: &State, name: &str, order: &Order) -> Result<Kept, Refused> {
        if order.lasts.is_some() || order.ramp.is_some() {
            return Err(invalid("a drained region stays so until it is restored: only `grace`, `reason` and `force` are read"));
        }
        let grace = span("grace", order.grace.as_deref())?.unwrap_or(state.live.load().snapshot.grace);
        let control = |reason| Control { kind: Kind::Drained, from: clock::now(), ramp: grace, until: None, reason };
        self.begin(state, name, order, control)
    }

    fn begin(&self, state: &State, name: &str, order: &Order, control: impl FnOnce(String) -> Control) -> Result<Kept, Refused> {
        let mut given = self.turn.lock();
        let live = state.live.load();
        let region = find(&live.snapshot, name)?;
        if !order.force {
            let alone = alone(&live.snapshot, region, clock::now());
            if !alone.is_empty() {
                let routes = alone.join(", ");
                let text = format!(
                    "without `{name}` no healthy region would be left for clients of route {routes}; --force does it all the same"
                );
                return Err(Refused::Harmful(text));
            }
        }
        let before = state.memory.region(name).share(clock::now());
        let control = control(order.reason.chars().take(REASON).collect()).from_share(before);
        let kept = Kept::of(name, &control, Now::new());
        let before = state.memory.region(name).control.swap(Some(Arc::new(control)));
        let after = stamp(&given, name, &self.node);
        if let Err(error) = self.save(state, &after) {
            state.memory.region(name).control.store(before);
            return Err(Refused::Disk(error.to_string()));
        }
        *given = after;
        self.changed.notify(usize::MAX);
        tracing::info!(
            audit = true,
            region = name,
            order = kept.kind.label(),
            until = kept.until.map(rfc3339),
            forced = order.force,
            reason = kept.reason,
            "region order"
        );
        Ok(kept)
    }

    /// Ends an order; traffic comes back in the ramp that it left in. Blocks on disk.
    pub fn restore(&self, state: &State, name: &str, order: &Order) -> Result<(), Refused> {
        let mut given = self.turn.lock();
        find(&state.live.load().snapshot, name)?;
        let region = state.memory.region(name);
        let before = region.control.load_full();
        let Some(control) = before.clone() else {
            return Err(invalid(&format!("region `{name}` is neither evacuated nor drained")));
        };
        let ended = control.ended(clock::now());
        region.control.store((!ended.is_over(clock::now())).then(|| Arc::new(ended)));
        let after = stamp(&given, name, &self.node);
        if let Err(error) = self.save(state, &after) {
            region.control.store(before);
            return Err(Refused::Disk(error.to_string()));
        }
        *given = after;
        self.changed.notify(usize::MAX);
        tracing::info!(audit = true, region = name, order = "restored", reason = order.reason, "region order");
        Ok(())
    }

    /// The last order for each region, for other nodes.
    pub fn stamped(&self, state: &State) -> Vec<Stamped> {
        let given = self.turn.lock();
        let now = Now::new();
        let stamped = |(region, when): (&String, &Given)| Stamped {
            region: region.clone(),
            given: when.clone(),
            order: state.memory.region(region).control.load().as_ref().map(|control| Kept::of(region, control, now)),
        };
        given.iter().map(stamped).collect()
    }

    /// Carries out what was ordered on another node, if it is later than what is known here. Blocks on disk.
    pub fn apply(&self, state: &State, stamped: Stamped) {
        let Stamped { region, given: when, order } = stamped;
        let mut given = self.turn.lock();
        // A name that this node never heard is not remembered for it.
        let known = state.live.load().snapshot.region_named(&region).is_some() || given.contains_key(&region);
        if !known || given.get(&region).is_some_and(|last| *last >= when) {
            return;
        }
        let now = Now::new();
        let control = order.map(|Kept { region: _, kind, from, ramp, until, reason }| Control {
            kind,
            from: now.moment(from.min(now.unix)),
            ramp: Duration::from_millis(ramp).min(LONGEST),
            until: match kind {
                Kind::Drained => None,
                Kind::Evacuated => Some(now.moment(until.unwrap_or_default()).min(now.moment.after(LONGEST))),
            },
            reason: reason.chars().filter(|c| !c.is_control()).take(REASON).collect(),
        });
        let control = control.filter(|control| !control.is_over(now.moment));
        tracing::info!(
            audit = true,
            region,
            order = control.as_ref().map_or("restored", |control| control.kind.label()),
            reason = control.as_ref().map(|control| control.reason.as_str()),
            "region order of another node"
        );
        state.memory.region(&region).control.store(control.map(Arc::new));
        given.insert(region, when);
        if let Err(error) = self.save(state, &given) {
            tracing::error!(%error, "an order of another node cannot be written to state_dir, and would not survive a restart");
        }
    }

    /// Orders in force.
    pub fn list(&self, state: &State) -> Vec<Kept> {
        let now = Now::new();
        let live = state.live.load();
        let kept = |region: &crate::regions::Region| Some(Kept::of(&region.name, region.state.control.load().as_ref()?, now));
        live.snapshot.regions.iter().filter_map(kept).collect()
    }

    /// Ends what has ended by itself, closes the tunnels of drained regions whose grace is over, and says when
    /// to look again. Blocks on disk.
    pub fn tick(&self, state: &State) -> Option<Duration> {
        let given = self.turn.lock();
        let now = clock::now();
        let mut next: Option<Moment> = None;
        let mut ended = Vec::new();
        for region in &state.live.load().snapshot.regions {
            let Some(control) = region.state.control.load_full() else { continue };
            if control.is_over(now) {
                region.state.control.store(None);
                ended.push((region.name.clone(), control));
                continue;
            }
            let stays_until = control.from.after(control.ramp);
            if control.kind == Kind::Drained && now >= stays_until {
                region.state.close.notify(usize::MAX);
            }
            let ends = control.until.map(|until| until.after(control.ramp));
            let grace = (control.kind == Kind::Drained && now < stays_until).then_some(stays_until);
            next = [next, ends, grace].into_iter().flatten().min();
        }
        if !ended.is_empty()
            && let Err(error) = self.save(state, &given)
        {
            tracing::error!(%error, "an order that ended cannot be taken out of state_dir");
        }
        for (region, control) in ended {
            tracing::info!(audit = true, region = &*region, order = "ended", reason = control.reason, "region order");
        }
        next.map(|next| next.since(now))
    }

    /// The folder of Portolan's own, if it has one.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Does an order outlive the process?
    pub fn survive(&self) -> bool {
        self.dir.is_some()
    }

    fn save(&self, state: &State, given: &BTreeMap<String, Given>) -> io::Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        // Also of regions that the configuration does not have at the moment.
        let now = Now::new();
        let kept = |(name, state): (String, Arc<crate::regions::control::RegionState>)| {
            Some(Kept::of(&name, state.control.load().as_ref()?, now))
        };
        let regions = state.memory.regions().into_iter().filter_map(kept).collect();
        let saved = Saved { version: 1, regions, given: given.clone() };
        replace(dir, FILE, &serde_json::to_vec_pretty(&saved)?, 0o644)
    }
}

/// The same, with an order for `name` given now: later than what is known, whatever clocks say.
fn stamp(given: &BTreeMap<String, Given>, name: &str, node: &str) -> BTreeMap<String, Given> {
    let mut after = given.clone();
    let last = after.entry(name.to_owned()).or_default();
    *last = Given { at: Now::new().unix.max(last.at.saturating_add(1)), node: node.to_owned() };
    after
}

/// The secret that signs cookies: the configured one, or the one in `dir`, or a new one, kept there if possible.
pub fn secret(configured: Option<&str>, dir: Option<&Path>) -> io::Result<Vec<u8>> {
    if let Some(secret) = configured {
        return Ok(secret.as_bytes().to_vec());
    }
    if let Some(dir) = dir {
        std::fs::create_dir_all(dir)?;
        match std::fs::read(dir.join(SECRET)) {
            Ok(secret) if secret.len() >= 32 => return Ok(secret),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut secret = vec![0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| io::Error::other("the system has no random numbers"))?;
    if let Some(dir) = dir {
        replace(dir, SECRET, &secret, 0o600)?;
    }
    Ok(secret)
}

/// Routes some of whose clients would be left without a healthy region if `region` went.
fn alone(snapshot: &Snapshot, region: RegionId, now: Moment) -> Vec<String> {
    // One that is just leaving serves nobody soon.
    let serves = |id: &RegionId| {
        let other = snapshot.region(*id).filter(|_| *id != region);
        other.is_some_and(|r| r.is_healthy(now) && r.state.control.load().is_none())
    };
    let alone = |order: &Vec<RegionId>| order.contains(&region) && !order.iter().any(serves);
    let routes = snapshot.routes.iter().filter(|route| route.steering.orders().iter().any(alone));
    routes.map(|route| route.name.to_string()).collect()
}

fn find(snapshot: &Snapshot, name: &str) -> Result<RegionId, Refused> {
    snapshot.region_named(name).ok_or_else(|| Refused::Unknown {
        name: name.to_owned(),
        defined: snapshot.regions.iter().map(|r| &*r.name).collect::<Vec<_>>().join(", "),
    })
}

fn span(key: &str, text: Option<&str>) -> Result<Option<Duration>, Refused> {
    let parse = |text: &str| text.parse::<Span>().map(|s| s.0).map_err(|e| invalid(&format!("`{key}`: {e}")));
    text.map(parse).transpose()
}

fn invalid(text: &str) -> Refused {
    Refused::Invalid(text.to_owned())
}
