//! YAML as a tree whose every node knows its file and span, so that any later stage can point at it.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use granit_parser::{Event, Parser, ScalarStyle, Span};

use super::load::Input;
use super::problem::{KeyPath, Place, Problem, Source};

/// A file may be this large, in bytes: a configuration of 10,000 routes is about 2 MiB.
pub const MAX_FILE: u64 = 16 << 20;
/// Aliases may expand a file to this many nodes ("billion laughs" stops here).
const MAX_NODES: usize = 1 << 20;
/// Nesting deeper than this is no configuration of ours.
const MAX_DEPTH: usize = 64;

/// One YAML value and where it stands.
#[derive(Debug, Clone)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Where it stands.
    pub place: Place,
}

/// A YAML value of the core schema.
#[derive(Debug, Clone)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole or decimal number.
    Number(serde_json::Number),
    /// Anything else that is scalar.
    Text(Text),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<Entry>),
}

/// A text and whether it was expanded from the environment or a file.
#[derive(Debug, Clone)]
pub struct Text {
    /// The text, expanded.
    pub value: String,
    /// It came from `${env:…}` or `${file:…}`: never print it.
    pub secret: bool,
}

/// One key of a mapping.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub place: Place,
    /// Its value.
    pub node: Node,
}

impl Value {
    /// The name of its kind, as in "expected a list, found text".
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Null => "nothing",
            Value::Bool(_) => "true or false",
            Value::Number(_) => "a number",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

impl Node {
    /// Parses one file. At most one problem: a file that is not YAML has no second place to trust.
    pub fn parse(source: &Arc<Source>) -> Result<Self, Problem> {
        Builder { source, parser: Parser::new_from_str(&source.text), anchors: HashMap::new(), nodes: 0 }.document()
    }

    /// The value under `key`, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            // Some keys, such as names of headers, are asked for in another case than they were written.
            Value::Map(entries) => {
                entries.iter().find(|e| e.key == key).or_else(|| entries.iter().find(|e| e.key.eq_ignore_ascii_case(key)))
            }
            _ => None,
        }
    }

    /// Lays `over` on top: mappings merge key by key, `null` removes a key, anything else replaces.
    pub fn merge(&mut self, over: Node) {
        match (&mut self.value, over.value) {
            (Value::Map(base), Value::Map(entries)) => {
                for entry in entries {
                    let position = base.iter().position(|e| e.key == entry.key);
                    match (position, &entry.node.value) {
                        (Some(i), Value::Null) => {
                            base.remove(i);
                        }
                        (Some(i), _) => {
                            if let Some(slot) = base.get_mut(i) {
                                slot.node.merge(entry.node);
                            }
                        }
                        (None, Value::Null) => {}
                        (None, _) => base.push(entry),
                    }
                }
            }
            (_, value) => *self = Node { value, place: over.place },
        }
    }

    /// Expands `${env:NAME}` and `${file:PATH}` inside every text. Files are read relative to the
    /// file that names them; one newline at a file's end is dropped.
    pub fn expand(&mut self, problems: &mut Vec<Problem>) -> Expanded {
        let mut expanded = Expanded::default();
        self.expand_at(&KeyPath::default(), problems, &mut expanded);
        expanded
    }

    fn expand_at(&mut self, path: &KeyPath, problems: &mut Vec<Problem>, files: &mut Expanded) {
        match &mut self.value {
            Value::Text(text) => match expand_text(&text.value, &self.place, files) {
                Ok(Some(value)) => *text = Text { value, secret: true },
                Ok(None) => {}
                Err(message) => problems.push(Problem::error(path.clone(), message).at(&self.place)),
            },
            Value::List(items) => {
                for (i, item) in items.iter_mut().enumerate() {
                    item.expand_at(&path.join(i), problems, files);
                }
            }
            Value::Map(entries) => {
                for entry in entries {
                    entry.node.expand_at(&path.join(&entry.key), problems, files);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Places `problem` at the deepest node of its path that exists.
    pub fn locate(&self, mut problem: Problem) -> Problem {
        if problem.place.is_some() {
            return problem;
        }
        let mut node = self;
        let mut place = &self.place;
        for (depth, step) in problem.path.0.iter().enumerate() {
            let next = match &node.value {
                Value::Map(_) => node.get(step).map(|e| (&e.node, &e.place)),
                Value::List(items) => step.parse::<usize>().ok().and_then(|i| items.get(i)).map(|n| (n, &n.place)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::Text(_) => None,
            };
            let Some((next, key_place)) = next else {
                // "One or many": the one has no place in a list, but it has one of its own.
                if !matches!(node.value, Value::Map(_) | Value::List(_)) {
                    place = &node.place;
                }
                break;
            };
            node = next;
            // A scalar is pointed at itself; a mapping or list by its key, for its span is long.
            let last = depth + 1 == problem.path.0.len();
            let scalar = !matches!(node.value, Value::Map(_) | Value::List(_));
            place = if last && scalar { &node.place } else { key_place };
        }
        if matches!(&node.value, Value::Text(text) if text.secret) {
            // What it says may well quote the value.
            problem.message = format!("the value of `{}` cannot be used (it is expanded, so it is not shown)", problem.path);
            problem.hint = None;
        }
        let part = problem.within.as_ref().and_then(|(value, span)| part(place, value, span));
        problem.place = Some(part.unwrap_or(first_line(place)));
        problem
    }
}

/// What was expanded.
#[derive(Debug, Default)]
pub struct Expanded {
    /// The files that were read.
    pub files: Vec<Input>,
    /// What was put in.
    pub secrets: Secrets,
}

/// Texts that nobody may see.
#[derive(Clone, Default)]
pub struct Secrets(Vec<String>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

impl Secrets {
    /// `text` without any of them.
    pub fn hide(&self, text: &str) -> String {
        let secrets = self.0.iter().filter(|s| !s.is_empty());
        secrets.fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "…"))
    }
}

/// Where a part of a value stands in the file: the value may be quoted, indented or folded there.
fn part(place: &Place, value: &str, span: &Range<usize>) -> Option<Place> {
    let written = place.source.text.get(place.span.clone())?;
    let found = |at: usize, len: usize| {
        let start = place.span.start + at;
        Some(Place { source: place.source.clone(), span: start..start + len })
    };
    let span = span.start.min(value.len())..span.end.min(value.len());
    if let Some(at) = written.find(value) {
        return found(at + span.start, span.len());
    }
    // One line of it.
    let line_start = value.get(..span.start)?.rfind('\n').map_or(0, |i| i + 1);
    let line = value.get(line_start..)?.lines().next()?.trim_end();
    if let Some(at) = written.find(line).filter(|_| !line.is_empty() && span.end <= line_start + line.len()) {
        return found(at + span.start - line_start, span.len());
    }
    // The words themselves, if they stand there once.
    let words = value.get(span)?;
    (written.matches(words).count() == 1).then(|| written.find(words))?.and_then(|at| found(at, words.len()))
}

/// A caret under twenty lines helps nobody: cut a place to its first line.
pub fn first_line(place: &Place) -> Place {
    let text = place.source.text.get(place.span.clone()).unwrap_or_default();
    let end = text.find('\n').map_or(place.span.end, |i| place.span.start + i);
    Place { source: place.source.clone(), span: place.span.start..end }
}

fn expand_text(text: &str, place: &Place, expanded: &mut Expanded) -> Result<Option<String>, String> {
    let mut out = String::new();
    let mut rest = text;
    let mut any = false;
    while let Some(start) = rest.find("${") {
        let (before, from) = rest.split_at(start);
        out.push_str(before);
        let kind = ["${env:", "${file:"].into_iter().find(|k| from.starts_with(k));
        let Some(kind) = kind else {
            // `${1}` and the like belong to other languages (regular expressions).
            out.push_str("${");
            rest = from.get(2..).unwrap_or_default();
            continue;
        };
        let body = from.get(kind.len()..).unwrap_or_default();
        let (name, after) = body.split_once('}').ok_or_else(|| format!("`{kind}` has no closing `}}`"))?;
        if kind == "${env:" {
            let value = std::env::var(name).map_err(|e| match e {
                std::env::VarError::NotPresent => format!("the environment variable `{name}` is not set"),
                std::env::VarError::NotUnicode(_) => format!("the environment variable `{name}` is not UTF-8"),
            })?;
            out.push_str(&value);
            expanded.secrets.0.push(value);
        } else {
            let file = beside(&place.source.path, Path::new(name));
            expanded.files.push(Input::now(file.clone()));
            let content = std::fs::read_to_string(&file).map_err(|e| format!("cannot read `{}`: {e}", file.display()))?;
            let value = content.strip_suffix('\n').unwrap_or(&content);
            out.push_str(value);
            expanded.secrets.0.push(value.to_owned());
        }
        any = true;
        rest = after;
    }
    out.push_str(rest);
    Ok(any.then_some(out))
}

/// `path` as the file `source` means it: relative paths are relative to the file's folder.
pub fn beside(source: &Path, path: &Path) -> PathBuf {
    source.parent().unwrap_or(Path::new("")).join(path)
}

struct Builder<'a> {
    source: &'a Arc<Source>,
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'a> Builder<'a> {
    fn document(mut self) -> Result<Node, Problem> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                _ if root.is_some() => {
                    return Err(self.problem("only one YAML document is read", self.range(&span)));
                }
                event => root = Some(self.node(event, &span, 0)?),
            }
        }
        Ok(root.unwrap_or(Node { value: Value::Map(Vec::new()), place: self.place(0..0) }))
    }

    /// The next event that carries data.
    fn next(&mut self) -> Result<(Event<'a>, Span), Problem> {
        loop {
            match self.parser.next_event() {
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok(event)) => return Ok(event),
                Some(Err(error)) => {
                    let start = self.byte(error.marker());
                    return Err(self.problem(&format!("this is not YAML: {}", error.info()), start..start + 1));
                }
                None => return Ok((Event::StreamEnd, Span::default())),
            }
        }
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node, Problem> {
        self.nodes += 1;
        let start = self.range(span);
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return Err(self.problem("nested too deeply, or too large", start));
        }
        let anchor = event.anchor_id();
        let (value, range) = match event {
            Event::Scalar(text, style, _, _) => (scalar(&text, style), start),
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    let (event, span) = self.next()?;
                    if matches!(event, Event::SequenceEnd) {
                        break (Value::List(items), start.start..self.range(&span).end);
                    }
                    items.push(self.node(event, &span, depth + 1)?);
                }
            }
            Event::MappingStart(..) => self.mapping(start.start, depth)?,
            Event::Alias(id) => {
                let mut node =
                    self.anchors.get(&id).cloned().ok_or_else(|| self.problem("this alias refers to itself", start.clone()))?;
                self.nodes += count(&node);
                node.place = self.place(start);
                return Ok(node);
            }
            _ => return Err(self.problem("unexpected YAML here", start)),
        };
        let node = Node { value, place: self.place(range) };
        if let Some(id) = anchor {
            self.anchors.insert(id, node.clone());
        }
        Ok(node)
    }

    fn mapping(&mut self, start: usize, depth: usize) -> Result<(Value, Range<usize>), Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let range = self.range(&span);
            let key = match event {
                Event::MappingEnd => return Ok((Value::Map(entries), start..range.end)),
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(self.problem("a key must be plain text", range)),
            };
            if entries.iter().any(|e| e.key == key) {
                return Err(self.problem(&format!("`{key}` stands here a second time"), range));
            }
            let (event, span) = self.next()?;
            let node = self.node(event, &span, depth + 1)?;
            entries.push(Entry { key, place: self.place(range), node });
        }
    }

    fn byte(&self, marker: &granit_parser::Marker) -> usize {
        marker
            .byte_offset()
            .unwrap_or_else(|| self.source.text.char_indices().nth(marker.index()).map_or(self.source.text.len(), |(i, _)| i))
    }

    fn range(&self, span: &Span) -> Range<usize> {
        self.byte(&span.start)..self.byte(&span.end)
    }

    fn place(&self, span: Range<usize>) -> Place {
        Place { source: self.source.clone(), span }
    }

    fn problem(&self, message: &str, span: Range<usize>) -> Problem {
        Problem::error(KeyPath::default(), message).at(&first_line(&self.place(span)))
    }
}

fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::List(items) => items.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|e| count(&e.node)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Text(_) => 0,
    }
}

/// YAML 1.2's core schema (section 10.3.2), without octal, infinity and not-a-number.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style == ScalarStyle::Plain {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
            "true" | "True" | "TRUE" => return Value::Bool(true),
            "false" | "False" | "FALSE" => return Value::Bool(false),
            _ => {}
        }
        // JSON's grammar is the part of the core schema that people write.
        if let Ok(number) = serde_json::from_str::<serde_json::Number>(text) {
            return Value::Number(number);
        }
    }
    Value::Text(Text { value: text.to_owned(), secret: false })
}
