//! What is wrong with a configuration: every problem at its place, with a way out.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

/// One configuration file as it was read: its name for messages and its text for carets.
#[derive(Debug)]
pub struct Source {
    /// The path as the operator named it.
    pub path: PathBuf,
    /// The whole text; secrets are only ever expanded later, so it holds none of their values.
    pub text: String,
}

/// A range of bytes in a [`Source`].
#[derive(Debug, Clone)]
pub struct Place {
    /// The file.
    pub source: Arc<Source>,
    /// Byte offsets into its text.
    pub span: Range<usize>,
}

impl Place {
    /// Line and column, both from 1, as editors count.
    pub fn line_column(&self) -> (usize, usize) {
        let before = self.source.text.get(..self.span.start).unwrap_or(&self.source.text);
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        let column = before.get(start..).map_or(0, |s| s.chars().count()) + 1;
        (line, column)
    }
}

/// Whether a [`Problem`] stops the configuration from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It cannot be used.
    Error,
    /// It can be used, but is probably not what was meant.
    Warning,
}

/// A key path into the configuration, such as `routes.0.steering`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyPath(pub Vec<String>);

impl KeyPath {
    /// This path with one more step.
    pub fn join(&self, step: impl ToString) -> Self {
        let mut steps = self.0.clone();
        steps.push(step.to_string());
        Self(steps)
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

/// Builds a [`KeyPath`] from steps of any printable kind.
#[macro_export]
macro_rules! key_path {
    ($($step:expr),* $(,)?) => {
        $crate::config::problem::KeyPath(vec![$($step.to_string()),*])
    };
}

/// Something the operator has to know about the configuration.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Does it stop the configuration?
    pub severity: Severity,
    /// What is wrong, in one sentence.
    pub message: String,
    /// The key it is about.
    pub path: KeyPath,
    /// Where it stands; `None` when no file could be read or the place is not in a file.
    pub place: Option<Place>,
    /// What stands at the caret: what was expected.
    pub label: String,
    /// A way out.
    pub hint: Option<String>,
    /// The part of the value that it is about: the value, and bytes of it.
    pub within: Option<(String, Range<usize>)>,
}

impl Problem {
    /// An error at `path`, to be placed later (see [`super::tree::Node::locate`]).
    pub fn error(path: KeyPath, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            path,
            place: None,
            label: String::new(),
            hint: None,
            within: None,
        }
    }

    /// A warning at `path`.
    pub fn warning(path: KeyPath, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(path, message) }
    }

    /// The same, standing at `place`.
    pub fn at(mut self, place: &Place) -> Self {
        self.place = Some(place.clone());
        self
    }

    /// The same, with a text at the caret.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// The same, with a way out.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same, about a part of `value`.
    pub fn within(mut self, value: &str, span: Range<usize>) -> Self {
        self.within = Some((value.to_owned(), span));
        self
    }

    /// Does it stop the configuration?
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// `file:line:column`, or an empty text.
    pub fn position(&self) -> String {
        self.place.as_ref().map_or_else(String::new, |place| {
            let (line, column) = place.line_column();
            format!("{}:{line}:{column}", place.source.path.display())
        })
    }

    /// The problem as an operator reads it: title, file, line, caret, hint.
    pub fn render(&self, color: bool) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = level.primary_title(self.message.as_str());
        let path = self.place.as_ref().map(|p| p.source.path.display().to_string());
        let group = match (&self.place, &path) {
            (Some(place), Some(path)) => {
                // Whole characters: a parser may point into one, and the renderer panics there.
                let text = place.source.text.as_str();
                let span = text.floor_char_boundary(place.span.start)..text.ceil_char_boundary(place.span.end.min(text.len()));
                title.element(
                    Snippet::source(place.source.text.as_str())
                        .path(path.as_str())
                        .annotation(AnnotationKind::Primary.span(span).label(self.label.as_str())),
                )
            }
            _ => annotate_snippets::Group::with_title(title),
        };
        let group = match &self.hint {
            Some(hint) => group.element(Level::HELP.message(hint.as_str())),
            None => group,
        };
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        renderer.decor_style(DecorStyle::Ascii).render(&[group])
    }

    /// The problem as JSON consumers read it.
    pub fn to_json(&self) -> ProblemJson {
        let position = self.place.as_ref().map(Place::line_column);
        ProblemJson {
            severity: self.severity,
            message: self.message.clone(),
            key: self.path.to_string(),
            file: self.place.as_ref().map(|p| p.source.path.display().to_string()),
            line: position.map(|p| p.0),
            column: position.map(|p| p.1),
            hint: self.hint.clone(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let position = self.position();
        if !position.is_empty() {
            write!(f, "{position}: ")?;
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// A [`Problem`] in `/status.json` and in the answer of `POST /reload`.
#[derive(Debug, Clone, Serialize)]
pub struct ProblemJson {
    /// Error or warning.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// The key path.
    pub key: String,
    /// The file, if there is one.
    pub file: Option<String>,
    /// Line from 1.
    pub line: Option<usize>,
    /// Column from 1.
    pub column: Option<usize>,
    /// A way out.
    pub hint: Option<String>,
}

/// "did you mean": the nearest of `known` to what was written, if near enough to be a slip.
pub fn nearest<'a>(written: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::damerau_levenshtein(written, name), name))
        .filter(|(distance, name)| *distance < name.len() && *distance <= 1 + name.len().max(written.len()) / 4)
        .min()
        .map(|(_, name)| name)
}
