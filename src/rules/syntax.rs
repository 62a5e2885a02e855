//! From text to [`Expr`]: recursive descent, with a bound on its depth.

use super::Limits;
use super::error::ExprError;
use super::tree::{Access, Argument, Base, Comparison, Expr, Literal, Logic, Op, Order, Right, Span, Step};

type Result<T> = std::result::Result<T, ExprError>;

/// Parses a whole logical expression.
pub fn parse(source: &str, limits: &Limits) -> Result<Expr> {
    let mut parser = Parser::new(source, limits)?;
    let expr = parser.logical(Logic::Or)?;
    parser.end()?;
    Ok(expr)
}

/// Parses a literal or an expression of any kind: what a text is made from.
pub fn parse_argument(source: &str, limits: &Limits) -> Result<Argument> {
    let mut parser = Parser::new(source, limits)?;
    let argument = parser.argument()?;
    parser.end()?;
    Ok(argument)
}

/// Comparisons, longest first where one begins another.
const OPERATORS: [(&str, Op); 20] = [
    ("strict wildcard", Op::StrictWildcard),
    ("bitwise_and", Op::BitwiseAnd),
    ("contains", Op::Contains),
    ("wildcard", Op::Wildcard),
    ("matches", Op::Matches),
    ("eq", Op::Order(Order::Equal)),
    ("ne", Op::Order(Order::NotEqual)),
    ("le", Op::Order(Order::LessEqual)),
    ("lt", Op::Order(Order::Less)),
    ("ge", Op::Order(Order::GreaterEqual)),
    ("gt", Op::Order(Order::Greater)),
    ("in", Op::In),
    ("==", Op::Order(Order::Equal)),
    ("!=", Op::Order(Order::NotEqual)),
    ("<=", Op::Order(Order::LessEqual)),
    (">=", Op::Order(Order::GreaterEqual)),
    ("<", Op::Order(Order::Less)),
    (">", Op::Order(Order::Greater)),
    ("~", Op::Matches),
    ("&", Op::BitwiseAnd),
];

struct Parser<'a> {
    source: &'a str,
    at: usize,
    depth: usize,
    limits: &'a Limits,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str, limits: &'a Limits) -> Result<Self> {
        if source.len() > limits.length {
            let message = format!("the expression is {} bytes long; at most {} are read", source.len(), limits.length);
            return Err(ExprError::new(limits.length..source.len(), message).hint("long sets belong under `lists`"));
        }
        Ok(Self { source, at: 0, depth: 0, limits })
    }

    fn rest(&self) -> &'a str {
        self.source.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start_matches([' ', '\t', '\r', '\n']).len();
    }

    /// Takes `text` if it is next.
    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// Takes a word if it is next and ends there.
    fn take_word(&mut self, word: &str) -> bool {
        let ends = self.rest().strip_prefix(word).is_some_and(|rest| !rest.starts_with(is_name));
        ends && self.take(word)
    }

    fn word_end(&self) -> usize {
        let rest = self.rest();
        self.at + rest.find(|c: char| c.is_whitespace() || "(){}[],\"".contains(c)).unwrap_or(rest.len()).max(1).min(rest.len())
    }

    fn expected<T>(&self, what: &str) -> Result<T> {
        let end = self.word_end();
        let message = match self.source.get(self.at..end) {
            None | Some("") => format!("expected {what}, but the expression ends"),
            Some(found) => format!("expected {what}, found `{found}`"),
        };
        Err(ExprError::new(self.at..end, message))
    }

    fn end(&mut self) -> Result<()> {
        self.space();
        if self.rest().is_empty() {
            return Ok(());
        }
        if self.peek() == Some(')') {
            let error = ExprError::new(self.at..self.at + 1, "this `)` closes nothing");
            return Err(error.hint("every `)` needs a `(` before it"));
        }
        let comment = ["#", "//", "/*"].iter().any(|c| self.rest().starts_with(c));
        let error = self.expected("`and`, `or`, `xor` or the end");
        match comment {
            true => error.map_err(|e| e.hint("there are no comments inside expressions")),
            false => error,
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == self.limits.depth {
            let message = format!("nested deeper than {} levels", self.limits.depth);
            return Err(ExprError::new(self.at..self.at + 1, message));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    /// `or` binds loosest, then `xor`, then `and`.
    fn logical(&mut self, logic: Logic) -> Result<Expr> {
        let (next, word, sign) = match logic {
            Logic::Or => (Some(Logic::Xor), "or", "||"),
            Logic::Xor => (Some(Logic::And), "xor", "^^"),
            Logic::And => (None, "and", "&&"),
        };
        let operand = |parser: &mut Self| match next {
            Some(next) => parser.logical(next),
            None => parser.unary(),
        };
        let mut all = vec![operand(self)?];
        loop {
            self.space();
            if !(self.take_word(word) || self.take(sign)) {
                break;
            }
            all.push(operand(self)?);
        }
        match (all.len(), all.pop()) {
            (1, Some(only)) => Ok(only),
            (_, last) => Ok(Expr::Logic(logic, all.into_iter().chain(last).collect())),
        }
    }

    fn unary(&mut self) -> Result<Expr> {
        self.space();
        let start = self.at;
        let not = self.take_word("not") || (!self.rest().starts_with("!=") && self.take("!"));
        if not {
            let inner = self.deeper(Self::unary)?;
            return Ok(Expr::Not(Box::new(inner)));
        }
        if self.take("(") {
            let inner = self.deeper(|p| p.logical(Logic::Or))?;
            self.space();
            if !self.take(")") {
                return self.expected("a closing `)`").map_err(|e| e.hint(format!("the `(` is at column {}", start + 1)));
            }
            return Ok(inner);
        }
        self.test()
    }

    fn test(&mut self) -> Result<Expr> {
        let access = self.access()?;
        self.space();
        let op_start = self.at;
        let Some(op) = self.operator()? else { return Ok(Expr::Test(access, None)) };
        let op_span = op_start..self.at;
        self.space();
        let start = self.at;
        let right = self.right(op)?;
        Ok(Expr::Test(access, Some(Comparison { op, op_span, right, right_span: start..self.at })))
    }

    fn operator(&mut self) -> Result<Option<Op>> {
        let rest = self.rest();
        if rest.starts_with("&&") {
            return Ok(None);
        }
        for (text, op) in OPERATORS {
            let found = match text.starts_with(|c: char| c.is_ascii_alphabetic()) {
                true => self.take_word(text),
                false => self.take(text),
            };
            if found {
                return Ok(Some(op));
            }
        }
        let word = rest.split(|c: char| !is_name(c)).next().unwrap_or_default();
        let lower = word.to_ascii_lowercase();
        let known = |name: &str| OPERATORS.iter().any(|(text, _)| *text == name) || ["and", "or", "xor", "not"].contains(&name);
        if word != lower && known(&lower) {
            let error = ExprError::new(self.at..self.at + word.len(), format!("expected an operator, found `{word}`"));
            return Err(error.hint(format!("operators are in lower case: `{lower}`")));
        }
        if rest.starts_with('=') {
            let error = ExprError::new(self.at..self.at + 1, "expected an operator, found `=`");
            return Err(error.hint("equality is `eq` or `==`"));
        }
        if word.starts_with(|c: char| c.is_ascii_alphabetic()) && !known(word) {
            let error = ExprError::new(self.at..self.at + word.len(), format!("unknown operator `{word}`"));
            let all = OPERATORS.iter().map(|(text, _)| *text).chain(["and", "or", "xor"]);
            return Err(match crate::config::problem::nearest(word, all) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None if word == "strict" => error.hint("the operator is `strict wildcard`, with one space"),
                None => error,
            });
        }
        Ok(None)
    }

    fn access(&mut self) -> Result<Access> {
        self.space();
        let start = self.at;
        let rest = self.rest();
        if !rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            let literal = rest.starts_with(['"', '\'', '$', '{']) || rest.starts_with(|c: char| c.is_ascii_digit());
            let error = self.expected("a field or a function");
            return match literal {
                true => error.map_err(|e| e.hint("literals stand to the right of an operator")),
                false => error,
            };
        }
        let name: String = rest.chars().take_while(|c| is_name(*c)).collect();
        self.at += name.len();
        let name_span = start..self.at;
        let lower = name.to_ascii_lowercase();
        if ["and", "or", "xor", "not"].contains(&lower.as_str()) {
            let error = ExprError::new(name_span, format!("expected a field or a function, found `{name}`"));
            return Err(if lower == name { error } else { error.hint(format!("operators are in lower case: `{lower}`")) });
        }
        let gap = self.rest().len() - self.rest().trim_start_matches([' ', '\t', '\r', '\n']).len();
        let base = match self.rest().get(gap..).and_then(|rest| rest.chars().next()) {
            Some('(') => {
                self.at += gap + 1;
                Base::Call(name, name_span, self.deeper(Self::arguments)?)
            }
            _ => Base::Field(name, name_span),
        };
        let mut steps = Vec::new();
        while self.peek() == Some('[') {
            let start = self.at;
            self.at += 1;
            self.space();
            let step = self.step()?;
            self.space();
            if !self.take("]") {
                return self.expected("a closing `]`");
            }
            if steps.len() == self.limits.depth {
                return Err(ExprError::new(start..self.at, format!("nested deeper than {} levels", self.limits.depth)));
            }
            steps.push((step, start..self.at));
        }
        Ok(Access { base, steps, span: start..self.at })
    }

    fn step(&mut self) -> Result<Step> {
        if self.take("*") {
            return Ok(Step::Each);
        }
        if self.rest().starts_with('"') || self.is_raw() {
            return match self.text()? {
                Literal::Text(bytes) => Ok(Step::Key(bytes)),
                Literal::Word(_) => self.expected("a key"),
            };
        }
        let digits: String = self.rest().chars().take_while(char::is_ascii_alphanumeric).collect();
        match super::value::integer(&digits).and_then(|n| u32::try_from(n).ok()).and_then(|n| usize::try_from(n).ok()) {
            Some(index) => {
                self.at += digits.len();
                Ok(Step::Index(index))
            }
            None => self.expected("an index such as `0`, a key such as `\"name\"`, or `*`"),
        }
    }

    fn arguments(&mut self) -> Result<Vec<Argument>> {
        let mut all = Vec::new();
        self.space();
        if self.take(")") {
            return Ok(all);
        }
        loop {
            all.push(self.argument()?);
            self.space();
            if self.take(")") {
                return Ok(all);
            }
            if !self.take(",") {
                return self.expected("`,` or a closing `)`");
            }
        }
    }

    fn argument(&mut self) -> Result<Argument> {
        self.space();
        let start = self.at;
        if self.rest().starts_with('"') || self.is_raw() {
            let text = self.text()?;
            return Ok(Argument::Literal(text, start..self.at));
        }
        if self.rest().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            let word = self.word()?;
            return Ok(Argument::Literal(word, start..self.at));
        }
        let expr = self.deeper(|p| p.logical(Logic::Or))?;
        Ok(Argument::Expr(expr, start..self.at))
    }

    fn right(&mut self, op: Op) -> Result<Right> {
        match (op, self.peek()) {
            (Op::In, Some('{')) => {
                self.at += 1;
                self.set().map(Right::Set)
            }
            (Op::In, Some('$')) => {
                self.at += 1;
                let name: String = self.rest().chars().take_while(|c| is_name(*c) || *c == '-').collect();
                if name.is_empty() {
                    return self.expected("the name of a list");
                }
                self.at += name.len();
                Ok(Right::List(name))
            }
            (Op::In, _) => self.expected("a set such as `{1 2}` or a list such as `$office`"),
            (_, Some('{')) => self.expected("one value").map_err(|e| e.hint("sets belong to the operator `in`")),
            (_, Some('$')) => self.expected("one value").map_err(|e| e.hint("lists belong to the operator `in`")),
            (Op::Matches, Some('"')) => self.regex().map(Right::One),
            _ => self.literal().map(Right::One),
        }
    }

    fn set(&mut self) -> Result<Vec<(Literal, Span)>> {
        let mut all = Vec::new();
        loop {
            self.space();
            if self.take("}") {
                return Ok(all);
            }
            if self.peek() == Some(',') {
                return self.expected("a value or `}`").map_err(|e| e.hint("the values of a set are separated by spaces"));
            }
            if self.rest().is_empty() {
                return self.expected("a closing `}`");
            }
            let start = self.at;
            let literal = self.literal()?;
            all.push((literal, start..self.at));
        }
    }

    fn literal(&mut self) -> Result<Literal> {
        match self.peek() {
            Some('"') => self.text(),
            _ if self.is_raw() => self.text(),
            Some('\'') => self.expected("a value").map_err(|e| e.hint("strings are quoted by `\"`")),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Result<Literal> {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".:/_-+".contains(c))).unwrap_or(rest.len());
        match rest.get(..end) {
            None | Some("") => self.expected("a value"),
            Some(word) => {
                self.at += end;
                Ok(Literal::Word(word.to_owned()))
            }
        }
    }

    fn is_raw(&self) -> bool {
        let rest = self.rest();
        rest.starts_with('r') && rest.trim_start_matches('r').trim_start_matches('#').starts_with('"') && !rest.starts_with("rr")
    }

    /// A string: quoted, or raw between `r#"` and `"#` with up to 255 `#`.
    fn text(&mut self) -> Result<Literal> {
        let start = self.at;
        if self.take("\"") {
            return self.quoted(start);
        }
        self.at += 1;
        let hashes = self.rest().len() - self.rest().trim_start_matches('#').len();
        if hashes > 255 {
            return Err(ExprError::new(start..self.at + hashes, "more than 255 `#` before a raw string"));
        }
        self.at += hashes + 1;
        let end = format!("\"{}", "#".repeat(hashes));
        let Some(len) = self.rest().find(&end) else {
            return Err(ExprError::new(start..self.source.len(), format!("this string lacks its closing `{end}`")));
        };
        let bytes = self.rest().get(..len).unwrap_or_default().as_bytes().to_vec();
        self.at += len + end.len();
        Ok(Literal::Text(bytes))
    }

    /// Behind the opening quote.
    fn quoted(&mut self, start: usize) -> Result<Literal> {
        let mut bytes = Vec::new();
        loop {
            let rest = self.rest();
            let Some(c) = rest.chars().next() else { return self.unclosed(start) };
            self.at += c.len_utf8();
            match c {
                '"' => return Ok(Literal::Text(bytes)),
                '\\' => {
                    let behind = rest.get(1..).unwrap_or_default();
                    let (byte, len) = escape(behind);
                    let Some(byte) = byte else {
                        let span = self.at - 1..self.at + len;
                        let shown = self.source.get(span.clone()).unwrap_or_default();
                        let error = ExprError::new(span, format!("`{shown}` is no escape"));
                        return Err(error.hint("escapes are `\\\"`, `\\\\`, `\\xHH` and `\\ooo`; a raw string r\"…\" has none"));
                    };
                    bytes.push(byte);
                    self.at += len;
                }
                _ => bytes.extend_from_slice(rest.get(..c.len_utf8()).unwrap_or_default().as_bytes()),
            }
        }
    }

    /// The quoted string of a regular expression: its escapes are the expression's own, but for that of the
    /// quote; inside a class (`["']`) a quote is a character like any other.
    fn regex(&mut self) -> Result<Literal> {
        let start = self.at;
        self.at += 1;
        let mut regex = String::new();
        let mut class = false;
        while let Some(c) = self.peek() {
            self.at += c.len_utf8();
            match c {
                '"' if !class => return Ok(Literal::Text(regex.into_bytes())),
                '\\' => {
                    let Some(next) = self.peek() else { break };
                    self.at += next.len_utf8();
                    if class || next != '"' {
                        regex.push('\\');
                    }
                    regex.push(next);
                    continue;
                }
                '[' if !class => class = true,
                ']' => class = false,
                _ => {}
            }
            regex.push(c);
        }
        self.unclosed(start)
    }

    fn unclosed<T>(&self, start: usize) -> Result<T> {
        Err(ExprError::new(start..self.source.len(), "this string lacks its closing `\"`"))
    }
}

/// The byte that the escape behind a backslash means, if it means one, and its length.
fn escape(behind: &str) -> (Option<u8>, usize) {
    let digits = |from: usize, len: usize, radix: u32| {
        let text = behind.get(from..from + len).filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()))?;
        u8::from_str_radix(text, radix).ok()
    };
    match behind.chars().next() {
        Some('"') => (Some(b'"'), 1),
        Some('\\') => (Some(b'\\'), 1),
        Some('x') => match digits(1, 2, 16) {
            Some(byte) => (Some(byte), 3),
            None => (None, 1),
        },
        Some('0'..='7') => match digits(0, 3, 8) {
            Some(byte) => (Some(byte), 3),
            None => (None, 1),
        },
        other => (None, other.map_or(0, char::len_utf8)),
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '.'
}
