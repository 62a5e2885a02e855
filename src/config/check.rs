//! Checks a [`Node`] tree against the JSON Schema of [`super::Config`] and collects every problem.
//!
//! The schema comes from the types, so a key cannot be accepted here and unknown there. Only the part
//! of JSON Schema that `schemars` writes for those types is understood.
//!
//! What comes back beside the problems is the tree as JSON, with a stand-in for each value that cannot
//! be used: the questions that follow ("is this region defined?") can then be asked of the rest, and
//! the operator hears all answers at once.

use serde_json::Value as Json;

use super::problem::{KeyPath, Place, Problem, nearest};
use super::tree::{Entry, Node, Value, first_line};
use super::units::check_format;

/// Every problem of `node` under `schema`, in the order of the file, and the tree with stand-ins.
pub fn check(node: &Node, schema: &Json) -> (Vec<Problem>, Json) {
    let mut checker = Checker { root: schema, problems: Vec::new() };
    let json = checker.node(node, schema, &KeyPath::default());
    (checker.problems, json)
}

struct Checker<'a> {
    root: &'a Json,
    problems: Vec<Problem>,
}

impl<'a> Checker<'a> {
    fn node(&mut self, node: &Node, schema: &'a Json, path: &KeyPath) -> Json {
        let branches = self.branches(schema);
        let Some(schema) = branches.iter().copied().find(|s| accepts(s, &node.value)) else {
            let expected: Vec<_> = branches.iter().filter_map(|s| expected(s)).collect();
            self.unexpected(node, path, &expected.join(" or "));
            return branches.first().map_or(Json::Null, |s| self.stand_in(s));
        };
        match &node.value {
            Value::Map(entries) => self.map(node, entries, schema, path),
            Value::List(items) => self.list(node, items, schema, path),
            Value::Text(text) => {
                let shown = if text.secret { "its value".to_owned() } else { format!("`{}`", text.value) };
                let options = options(schema);
                if !options.is_empty() && !options.contains(&text.value.as_str()) {
                    self.option(node, path, &text.value, &shown, &options);
                    return self.stand_in(schema);
                }
                let format = schema.get("format").and_then(Json::as_str).unwrap_or_default();
                match check_format(format, &text.value) {
                    Ok(()) => Json::String(text.value.clone()),
                    Err(expected) => {
                        self.add(path, &node.place, format!("{shown} does not fit `{}`", last(path)), &expected);
                        self.stand_in(schema)
                    }
                }
            }
            Value::Number(number) => self.number(node, number, schema, path),
            Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
        }
    }

    fn list(&mut self, node: &Node, items: &[Node], schema: &'a Json, path: &KeyPath) -> Json {
        let min = schema.get("minItems").and_then(Json::as_u64).unwrap_or(0);
        let of = schema.get("items").unwrap_or(&Json::Null);
        if (items.len() as u64) < min {
            self.add(path, &node.place, "this list is empty".to_owned(), "expected at least one");
            return self.stand_in(schema);
        }
        items.iter().enumerate().map(|(i, item)| self.node(item, of, &path.join(i))).collect()
    }

    fn number(&mut self, node: &Node, number: &serde_json::Number, schema: &'a Json, path: &KeyPath) -> Json {
        let value = number.as_f64().unwrap_or(f64::NAN);
        let bound = |key| schema.get(key).and_then(Json::as_f64);
        let (min, max) = (bound("minimum"), bound("maximum"));
        let whole = schema.get("type").is_some_and(|t| names(t).contains(&"integer"));
        let outside = min.is_some_and(|m| value < m) || max.is_some_and(|m| value > m);
        let listed = schema.get("enum").and_then(Json::as_array);
        if let Some(listed) = listed.filter(|all| !all.iter().any(|one| one.as_f64() == Some(value))) {
            let listed: Vec<_> = listed.iter().map(Json::to_string).collect();
            let expected = format!("expected one of {}", listed.join(", "));
            self.add(path, &node.place, format!("`{number}` does not fit `{}`", last(path)), &expected);
            return self.stand_in(schema);
        }
        if !outside && (!whole || value.fract() == 0.0) {
            return Json::Number(number.clone());
        }
        let kind = if whole { "a whole number" } else { "a number" };
        let range = match (min, max) {
            (Some(min), Some(max)) => format!("expected {kind} from {min} to {max}"),
            (Some(min), None) => format!("expected {kind}, at least {min}"),
            (None, Some(max)) => format!("expected {kind}, at most {max}"),
            (None, None) => format!("expected {kind}"),
        };
        self.add(path, &node.place, format!("`{number}` does not fit `{}`", last(path)), &range);
        self.stand_in(schema)
    }

    fn map(&mut self, node: &Node, entries: &[Entry], schema: &'a Json, path: &KeyPath) -> Json {
        let properties = schema.get("properties").and_then(Json::as_object);
        let known = || properties.into_iter().flatten().map(|(key, _)| key.as_str());
        let mut json = serde_json::Map::new();
        for entry in entries {
            let path = path.join(&entry.key);
            let of = properties.and_then(|p| p.get(&entry.key));
            let other = schema.get("additionalProperties").filter(|s| s.is_object());
            match of.or(other) {
                Some(of) => {
                    let value = self.node(&entry.node, of, &path);
                    let format = schema.pointer("/propertyNames/format").and_then(Json::as_str).unwrap_or_default();
                    match check_format(format, &entry.key) {
                        Ok(()) => drop(json.insert(entry.key.clone(), value)),
                        Err(expected) => {
                            self.add(&path, &entry.place, format!("the key `{}` does not fit", entry.key), &expected)
                        }
                    }
                }
                None => {
                    let mut problem = Problem::error(path.clone(), format!("`{}` is not a key here", entry.key))
                        .at(&entry.place)
                        .label("unknown key");
                    problem.hint = Some(match nearest(&entry.key, known()) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => format!("known here: {}", known().collect::<Vec<_>>().join(", ")),
                    });
                    self.problems.push(problem);
                }
            }
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten();
        for key in required.filter_map(Json::as_str) {
            if node.get(key).is_none() {
                let of = if path.0.is_empty() { "the configuration".to_owned() } else { format!("`{path}`") };
                self.add(path, &node.place, format!("`{key}` is missing"), &format!("{of} needs `{key}`"));
                let stand_in = properties.and_then(|p| p.get(key)).map_or(Json::Null, |s| self.stand_in(s));
                json.insert(key.to_owned(), stand_in);
            }
        }
        Json::Object(json)
    }

    /// A value that `schema` accepts.
    fn stand_in(&self, schema: &'a Json) -> Json {
        let Some(schema) = self.branches(schema).first().copied() else { return Json::Null };
        let number = schema.pointer("/enum/0").filter(|n| n.is_number());
        let given = [schema.get("default"), schema.pointer("/examples/0"), number, schema.get("minimum")];
        if let Some(given) = given.into_iter().flatten().find(|v| !v.is_null()) {
            return given.clone();
        }
        let types = schema.get("type").map(names).unwrap_or_default();
        match types.first() {
            Some(&"array") => match schema.get("minItems").is_some() {
                true => Json::Array(schema.get("items").map(|s| self.stand_in(s)).into_iter().collect()),
                false => Json::Array(Vec::new()),
            },
            Some(&"object") => {
                let required = schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
                let value =
                    |key: &str| schema.get("properties").and_then(|p| p.get(key)).map_or(Json::Null, |s| self.stand_in(s));
                Json::Object(required.map(|key| (key.to_owned(), value(key))).collect())
            }
            Some(&"boolean") => Json::Bool(false),
            _ => options(schema).first().map_or(Json::Null, |o| Json::String((*o).to_owned())),
        }
    }

    fn option(&mut self, node: &Node, path: &KeyPath, value: &str, shown: &str, options: &[&str]) {
        let list = options.join(", ");
        let mut problem = Problem::error(path.clone(), format!("{shown} does not fit `{}`", last(path)));
        problem = problem.at(&node.place).label(format!("expected one of: {list}"));
        if let Some(near) = nearest(value, options.iter().copied()) {
            problem = problem.hint(format!("did you mean `{near}`?"));
        }
        self.problems.push(problem);
    }

    fn unexpected(&mut self, node: &Node, path: &KeyPath, expected: &str) {
        let found = node.value.kind();
        let message = format!("expected {expected}, found {found}");
        let place = first_line(&node.place);
        let mut problem = Problem::error(path.clone(), message).at(&place).label(format!("expected {expected}"));
        match &node.value {
            Value::Number(n) if expected.contains("duration") => {
                problem = problem.hint(format!("a duration has a unit: `{n}s` or `{n}ms`"));
            }
            Value::Number(_) | Value::Bool(_) if expected.contains("text") => {
                problem = problem.hint("write it in quotes");
            }
            _ => {}
        }
        self.problems.push(problem);
    }

    fn add(&mut self, path: &KeyPath, place: &Place, message: String, label: &str) {
        self.problems.push(Problem::error(path.clone(), message).at(&first_line(place)).label(label));
    }

    /// `schema` with references followed and alternatives laid out.
    fn branches(&self, schema: &'a Json) -> Vec<&'a Json> {
        if let Some(name) = schema.get("$ref").and_then(Json::as_str) {
            let target = self.root.pointer(name.trim_start_matches('#'));
            return target.map(|t| self.branches(t)).unwrap_or_default();
        }
        let alternatives = ["anyOf", "oneOf"].iter().find_map(|k| schema.get(*k)?.as_array());
        match alternatives {
            Some(list) if list.iter().all(|s| s.get("const").is_none()) => list.iter().flat_map(|s| self.branches(s)).collect(),
            _ => vec![schema],
        }
    }
}

/// The last key of a path, or the last two where the last is a position.
fn last(path: &KeyPath) -> String {
    match path.0.as_slice() {
        [.., key, index] if index.bytes().all(|b| b.is_ascii_digit()) => key.clone(),
        [.., key] => key.clone(),
        [] => "the configuration".to_owned(),
    }
}

/// The names in a schema's `type`, which is one or a list.
fn names(of: &Json) -> Vec<&str> {
    match of {
        Json::Array(list) => list.iter().filter_map(Json::as_str).collect(),
        other => other.as_str().into_iter().collect(),
    }
}

/// The texts that an enumeration allows; empty when it is none.
fn options(schema: &Json) -> Vec<&str> {
    if let Some(list) = schema.get("enum").and_then(Json::as_array) {
        return list.iter().filter_map(Json::as_str).collect();
    }
    let list = schema.get("oneOf").and_then(Json::as_array).into_iter().flatten();
    list.filter_map(|s| s.get("const")?.as_str()).collect()
}

fn accepts(schema: &Json, value: &Value) -> bool {
    let Some(types) = schema.get("type").map(names) else {
        return !options(schema).is_empty() && matches!(value, Value::Text(_));
    };
    let accepted: &[&str] = match value {
        Value::Null => &["null"],
        Value::Bool(_) => &["boolean"],
        Value::Number(_) => &["integer", "number"],
        Value::Text(_) => &["string"],
        Value::List(_) => &["array"],
        Value::Map(_) => &["object"],
    };
    types.iter().any(|t| accepted.contains(t))
}

fn expected(schema: &Json) -> Option<String> {
    let types = schema.get("type").map(names).unwrap_or_else(|| vec!["string"]);
    let name = match *types.iter().find(|t| **t != "null")? {
        "boolean" => "true or false",
        "integer" => "a whole number",
        "number" => "a number",
        "array" => "a list",
        "object" => "a mapping",
        _ => match schema.get("format").and_then(Json::as_str) {
            Some("duration") => "a duration (text such as `5s`)",
            Some("label") => "a name (text)",
            _ => "text",
        },
    };
    Some(name.to_owned())
}
