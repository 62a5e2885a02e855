//! Requests of the last minutes: of all, and by route, region and country. `/status.json` and the page read it without
//! Prometheus.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use super::sketch::{History, Lengths, Part, Series, Summary, Windows};
use crate::config::units::Country;

/// Points of the curves: one a second.
const POINTS: usize = 300;
/// A letter, then a letter or a digit.
const COUNTRIES: usize = 26 * 36;

/// Requests of the last minutes.
#[derive(Debug)]
pub struct Traffic {
    /// Requests that no route has.
    pub unrouted: Series,
    /// All requests: those of all routes, and of none.
    all: Mutex<History>,
    routes: Named,
    regions: Named,
    countries: Box<[OnceLock<Box<Series>>]>,
    points: Mutex<VecDeque<Point>>,
}

/// Series by name; they outlive reloads.
#[derive(Debug, Default)]
struct Named(Mutex<BTreeMap<Arc<str>, Arc<Series>>>);

/// One second of the curves.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Point {
    /// When it was over, in seconds since 1970.
    pub at: u64,
    /// What was in it.
    #[serde(flatten)]
    pub summary: Summary,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            unrouted: Series::default(),
            all: Mutex::default(),
            routes: Named::default(),
            regions: Named::default(),
            countries: (0..COUNTRIES).map(|_| OnceLock::new()).collect(),
            points: Mutex::default(),
        }
    }
}

impl Named {
    fn get(&self, name: &Arc<str>) -> Arc<Series> {
        self.0.lock().entry(name.clone()).or_default().clone()
    }

    fn all(&self) -> Vec<(Arc<str>, Arc<Series>)> {
        self.0.lock().iter().map(|(name, series)| (name.clone(), series.clone())).collect()
    }
}

fn place(country: Country) -> Option<usize> {
    let [first, second] = country.as_str().as_bytes() else { return None };
    let second = match second {
        b'0'..=b'9' => 26 + usize::from(second - b'0'),
        _ => usize::from(second.checked_sub(b'A')?),
    };
    Some(usize::from(first.checked_sub(b'A')?) * 36 + second)
}

fn country_at(place: usize) -> Option<Country> {
    let letter = |n: usize| char::from(b'A' + n as u8);
    let second = |n: usize| if n < 26 { letter(n) } else { char::from(b'0' + (n - 26) as u8) };
    Country::from_database(&String::from_iter([letter(place / 36), second(place % 36)]))
}

impl Traffic {
    /// The series of a route.
    pub fn route(&self, name: &Arc<str>) -> Arc<Series> {
        self.routes.get(name)
    }

    /// The series of a region: of attempts in it.
    pub fn region(&self, name: &Arc<str>) -> Arc<Series> {
        self.regions.get(name)
    }

    /// The series of a country. As many as there are codes.
    pub fn country(&self, country: Country) -> Option<&Series> {
        Some(self.countries.get(place(country)?)?.get_or_init(Box::default))
    }

    /// Forgets routes and regions that nobody holds on to any more.
    pub fn tidy(&self) {
        for named in [&self.routes, &self.regions] {
            named.0.lock().retain(|_, series| Arc::strong_count(series) > 1);
        }
    }

    /// A second is over, or however long it `took`; `at` in seconds since 1970.
    pub fn tick(&self, at: u64, took: Duration) {
        self.regions.all().iter().for_each(|(_, series)| drop(series.tick(took)));
        self.countries.iter().filter_map(OnceLock::get).for_each(|series| drop(series.tick(took)));
        let routes = self.routes.all();
        let parts: Vec<_> = routes.iter().map(|(_, series)| series.tick(took)).chain([self.unrouted.tick(took)]).collect();
        let mut all = self.all.lock();
        all.push(Part::merged(&parts));
        let mut points = self.points.lock();
        if points.len() == POINTS {
            points.pop_front();
        }
        points.push_back(Point { at, summary: all.last() });
    }

    /// All requests.
    pub fn windows(&self) -> Windows {
        let all = self.all.lock();
        all.windows(all.lengths())
    }

    fn lengths(&self) -> Lengths {
        self.all.lock().lengths()
    }

    /// The curves of the last five minutes, the oldest second first.
    pub fn points(&self) -> Vec<Point> {
        self.points.lock().iter().copied().collect()
    }

    /// The last second.
    pub fn latest(&self) -> Option<Point> {
        self.points.lock().back().copied()
    }

    /// Routes by name.
    pub fn routes(&self) -> BTreeMap<Arc<str>, Windows> {
        let lengths = self.lengths();
        self.routes.all().into_iter().map(|(name, series)| (name, series.windows(lengths))).collect()
    }

    /// Regions by name.
    pub fn regions(&self) -> BTreeMap<Arc<str>, Windows> {
        let lengths = self.lengths();
        self.regions.all().into_iter().map(|(name, series)| (name, series.windows(lengths))).collect()
    }

    /// Countries that asked for something in the last five minutes.
    pub fn countries(&self) -> Vec<(Country, Windows)> {
        let known = self.countries.iter().enumerate().filter_map(|(place, series)| Some((country_at(place)?, series.get()?)));
        let lengths = self.lengths();
        let windows = known.map(|(country, series)| (country, series.windows(lengths)));
        windows.filter(|(_, windows)| windows.five_minutes.requests > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_place_of_its_own() {
        for code in ["AA", "ZZ", "GB", "XX", "A1", "T1", "Z9"] {
            let country = Country::from_database(code).unwrap();
            assert_eq!(place(country).and_then(country_at), Some(country), "{code}");
        }
        assert_eq!(place(Country::from_database("Z9").unwrap()), Some(COUNTRIES - 1));
    }

    #[test]
    fn the_curves_are_five_minutes_long_and_names_go_with_their_holders() {
        let traffic = Traffic::default();
        let name: Arc<str> = "shop".into();
        let route = traffic.route(&name);
        for at in 0..400 {
            traffic.unrouted.add(Duration::from_millis(5), at % 2 == 0);
            route.add(Duration::from_millis(5), false);
            traffic.tick(at, Duration::from_secs(1));
        }
        let points = traffic.points();
        assert_eq!((points.len(), points[0].at, points[299].at), (300, 100, 399));
        assert_eq!((points[0].summary.requests, points[0].summary.failed), (2, 1));
        traffic.tidy();
        assert_eq!(traffic.routes()[&name].minute.requests, 60);
        drop(route);
        traffic.tidy();
        assert!(traffic.routes().is_empty());
    }
}
