//! Numbers of the admin side's answers, for people.

use serde_json::Value;

/// A text of `value`, or whatever stands there as one; nothing for nothing.
pub fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// A number of `value`.
pub fn number(value: &Value, pointer: &str) -> Option<f64> {
    value.pointer(pointer).and_then(Value::as_f64)
}

/// A list of `value`; an empty one where there is none.
pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// So many a second.
pub fn rate(per_second: f64) -> String {
    match per_second {
        n if n >= 9_950.0 => format!("{:.1} k", n / 1_000.0),
        n if n >= 10.0 || n == 0.0 => format!("{n:.0}"),
        n => format!("{n:.1}"),
    }
}

/// A part of all.
pub fn percent(ratio: f64) -> String {
    match ratio {
        0.0 => "0 %".to_owned(),
        n if n < 0.001 => "< 0.1 %".to_owned(),
        n if n >= 0.1 => format!("{:.0} %", n * 100.0),
        n => format!("{:.1} %", n * 100.0),
    }
}

/// A time in milliseconds.
pub fn ms(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(n) if n >= 1_000.0 => format!("{:.1} s", n / 1_000.0),
        Some(n) if n >= 10.0 => format!("{n:.0} ms"),
        Some(n) => format!("{n:.1} ms"),
    }
}

/// A number of bytes.
pub fn bytes(value: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let nth = ((value.max(1.0).log2() / 10.0) as usize).min(units.len() - 1);
    let value = value / 1024f64.powi(nth as i32);
    format!("{value:.0} {}", units.get(nth).unwrap_or(&"B"))
}

/// A span in seconds, by its two greatest units.
pub fn span(seconds: f64) -> String {
    let seconds = seconds as u64;
    let parts = [(seconds / 86_400, "d"), (seconds / 3_600 % 24, "h"), (seconds / 60 % 60, "min"), (seconds % 60, "s")];
    let shown: Vec<_> = parts
        .into_iter()
        .skip_while(|(n, _)| *n == 0)
        .take(2)
        .filter(|(n, _)| *n > 0)
        .map(|(n, unit)| format!("{n} {unit}"))
        .collect();
    if shown.is_empty() { "0 s".to_owned() } else { shown.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        assert_eq!([0.0, 0.25, 9.94, 10.4, 12_345.0].map(rate), ["0", "0.2", "9.9", "10", "12.3 k"]);
        assert_eq!([0.0, 0.0001, 0.0123, 0.5].map(percent), ["0 %", "< 0.1 %", "1.2 %", "50 %"]);
        assert_eq!([None, Some(0.5), Some(12.4), Some(1_500.0)].map(ms), ["–", "0.5 ms", "12 ms", "1.5 s"]);
        assert_eq!([0.0, 512.0, 2_048.0, 5e9].map(bytes), ["0 B", "512 B", "2 KiB", "5 GiB"]);
        assert_eq!([0.0, 59.0, 61.0, 3_600.0, 90_061.0].map(span), ["0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h"]);
    }
}
