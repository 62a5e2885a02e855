//! Countries on the map: continent and centre of each, from `geoip/countries.tsv`.

use std::sync::LazyLock;

use crate::config::units::{Continent, Country};

/// A point on the globe as a unit vector: what is nearer has the greater product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    x: f64,
    y: f64,
    z: f64,
}

/// Mean radius of the earth in km (IUGG).
const EARTH: f64 = 6371.0;

impl Point {
    /// From degrees.
    pub fn new(latitude: f64, longitude: f64) -> Self {
        let (lat, lon) = (latitude.to_radians(), longitude.to_radians());
        Self { x: lat.cos() * lon.cos(), y: lat.cos() * lon.sin(), z: lat.sin() }
    }

    /// Degrees north of the equator.
    pub fn latitude(self) -> f64 {
        self.z.clamp(-1.0, 1.0).asin().to_degrees()
    }

    /// Degrees east of Greenwich.
    pub fn longitude(self) -> f64 {
        self.y.atan2(self.x).to_degrees()
    }

    /// The middle of points on the globe; nothing if they have none.
    pub fn middle(points: impl Iterator<Item = Self>) -> Option<Self> {
        let (x, y, z) = points.fold((0.0, 0.0, 0.0), |(x, y, z), p| (x + p.x, y + p.y, z + p.z));
        let length = (x * x + y * y + z * z).sqrt();
        (length > 1e-9).then(|| Self { x: x / length, y: y / length, z: z / length })
    }

    /// Along a great circle, in km.
    pub fn distance(self, other: Self) -> f64 {
        let product = self.x * other.x + self.y * other.y + self.z * other.z;
        EARTH * product.clamp(-1.0, 1.0).acos()
    }
}

static COUNTRIES: LazyLock<Box<[(Country, Continent, Point)]>> = LazyLock::new(|| {
    let lines = include_str!("../../geoip/countries.tsv").lines().filter(|l| !l.starts_with('#'));
    let mut all: Vec<_> = lines.filter_map(line).collect();
    all.sort_by_key(|(country, ..)| *country);
    all.into()
});

fn line(line: &str) -> Option<(Country, Continent, Point)> {
    let mut fields = line.split('\t');
    let country = Country::from_database(fields.next()?)?;
    let continent = fields.next()?.parse().ok()?;
    let point = Point::new(fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((country, continent, point))
}

/// Every country.
pub fn countries() -> impl Iterator<Item = Country> {
    COUNTRIES.iter().map(|(country, ..)| *country)
}

/// Every country of `continent`.
pub fn countries_of(continent: Continent) -> impl Iterator<Item = Country> {
    COUNTRIES.iter().filter(move |(_, c, _)| *c == continent).map(|(country, ..)| *country)
}

/// The continent of `country`.
pub fn continent(country: Country) -> Option<Continent> {
    let i = COUNTRIES.binary_search_by_key(&country, |(c, ..)| *c).ok()?;
    COUNTRIES.get(i).map(|(_, continent, _)| *continent)
}

/// Members of the European Union (2026).
const EUROPEAN_UNION: &str = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK";

/// Is `country` a member of the European Union?
pub fn is_in_european_union(country: Country) -> bool {
    EUROPEAN_UNION.split(' ').any(|code| code == country.as_str())
}

/// The centre of `country`.
pub fn centre(country: Country) -> Option<Point> {
    let i = COUNTRIES.binary_search_by_key(&country, |(c, ..)| *c).ok()?;
    COUNTRIES.get(i).map(|(_, _, point)| *point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_country_has_its_place() {
        let lines = include_str!("../../geoip/countries.tsv").lines().filter(|l| !l.starts_with('#') && !l.is_empty()).count();
        assert_eq!(COUNTRIES.len(), lines, "every line can be read");
        assert_eq!(COUNTRIES.len(), 250, "249 of ISO 3166-1, and Kosovo");
        assert!(COUNTRIES.iter().all(|(country, ..)| country.is_assigned()));
        let of = |c: Continent| countries_of(c).map(|c| c.to_string()).collect::<Vec<_>>();
        for (continent, country) in [
            (Continent::EU, "GB"),
            (Continent::NA, "US"),
            (Continent::AS, "JP"),
            (Continent::OC, "AU"),
            (Continent::SA, "BR"),
            (Continent::AF, "ZA"),
            (Continent::AN, "AQ"),
        ] {
            assert!(of(continent).contains(&country.to_owned()), "{country}");
        }
    }

    #[test]
    fn distances() {
        let point = |c: &str| centre(c.parse().unwrap()).unwrap();
        let (london, new_york) = (Point::new(51.51, -0.13), Point::new(40.71, -74.01));
        assert!((london.distance(new_york) - 5570.0).abs() < 10.0, "{}", london.distance(new_york));
        assert!(point("FR").distance(london) < point("JP").distance(london));
        assert!(point("NZ").distance(point("AU")) < point("NZ").distance(point("US")));
        assert!(london.distance(london) < 0.001);
        assert!((london.latitude() - 51.51).abs() < 1e-9 && (new_york.longitude() + 74.01).abs() < 1e-9);
        let across = [Point::new(0.0, 170.0), Point::new(0.0, -170.0)];
        assert!((Point::middle(across.into_iter()).unwrap().longitude().abs() - 180.0).abs() < 1e-9, "not in Africa");
        assert_eq!(Point::middle([Point::new(0.0, 0.0), Point::new(0.0, 180.0)].into_iter()), None);
    }
}
