//! A writer for the one shape this program prints: flat objects of numbers and strings, on one line.

use std::fmt::Write;

/// An object under construction; the members keep the order in which they were added.
pub(crate) struct Object {
    text: String,
}

impl Object {
    /// `{}` so far.
    pub(crate) fn new() -> Self {
        Self { text: String::from("{") }
    }

    /// Adds `"name":value`.
    pub(crate) fn number(self, name: &str, value: u64) -> Self {
        self.raw(name, &value.to_string())
    }

    /// Adds `"name":value`, or `"name":null` where there is nothing to name.
    pub(crate) fn number_or_null(self, name: &str, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.number(name, value),
            None => self.raw(name, "null"),
        }
    }

    /// Adds `"name":"value"`, escaped.
    pub(crate) fn string(self, name: &str, value: &str) -> Self {
        self.raw(name, &quoted(value))
    }

    /// Adds `"name":json`; `json` has to be a value in itself.
    pub(crate) fn raw(mut self, name: &str, json: &str) -> Self {
        if self.text.len() > 1 {
            self.text.push(',');
        }
        self.text.push_str(&quoted(name));
        self.text.push(':');
        self.text.push_str(json);
        self
    }

    /// The finished text, without a line end.
    pub(crate) fn finish(mut self) -> String {
        self.text.push('}');
        self.text
    }
}

/// `[a,b,...]` of finished values.
pub(crate) fn array(values: &[String]) -> String {
    format!("[{}]", values.join(","))
}

fn quoted(value: &str) -> String {
    let mut out = String::from("\"");
    for character in value.chars() {
        match character {
            '"' | '\\' => {
                out.push('\\');
                out.push(character);
            }
            control if control < ' ' => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(control));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_keep_their_order_and_strings_are_escaped() {
        let text = Object::new()
            .string("b", "a \"quoted\" back\\slash,\na line")
            .number("a", u64::MAX)
            .number_or_null("n", None)
            .raw("list", &array(&[Object::new().finish(), Object::new().number("x", 1).finish()]))
            .finish();

        assert_eq!(
            text,
            r#"{"b":"a \"quoted\" back\\slash,\u000aa line","a":18446744073709551615,"n":null,"list":[{},{"x":1}]}"#
        );
    }
}
