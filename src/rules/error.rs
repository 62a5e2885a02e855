//! What is wrong with an expression, and where.

use std::fmt;
use std::ops::Range;

/// Something that an expression's author has to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ExprError {
    /// Bytes of the expression that it is about.
    pub span: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// A way out.
    pub hint: Option<String>,
}

impl ExprError {
    /// `message` about `span`.
    pub fn new(span: Range<usize>, message: impl Into<String>) -> Self {
        Self { span, message: message.into(), hint: None }
    }

    /// The same, with a way out.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The line of `source` that it is about, with a caret below, the reason, and the way out.
    pub fn draw(&self, source: &str) -> String {
        let start = source.floor_char_boundary(self.span.start.min(source.len()));
        let end = source.floor_char_boundary(self.span.end.clamp(start, source.len()));
        let before = source.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = source.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
        let column = source.get(line_start..start).unwrap_or_default().chars().count();
        let marked = source.get(start..end.min(line_start + line.len()).max(start)).unwrap_or_default().chars().count().max(1);
        let number = before.matches('\n').count() + 1;
        let mut text =
            format!("{number}:{}: {}\n  {line}\n  {}{}", column + 1, self.message, " ".repeat(column), "^".repeat(marked));
        if let Some(hint) = &self.hint {
            text.push_str("\n  help: ");
            text.push_str(hint);
        }
        text
    }
}

impl fmt::Display for ExprError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}
