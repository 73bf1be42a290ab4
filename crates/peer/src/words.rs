//! The words behind a command: settings (`name=value`), of which a misspelt one is an error.

use crate::failure::Failure;
use crate::text;

/// The settings of one command line.
pub(crate) struct Settings<'a> {
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Settings<'a> {
    /// Splits `words` into settings.
    ///
    /// # Errors
    /// A word without `=`, or a name given twice.
    pub(crate) fn parse(words: &'a str) -> Result<Self, Failure> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for word in words.split_whitespace() {
            let (name, value) = word
                .split_once('=')
                .ok_or_else(|| Failure::new(format!("expected name=value, got {word:?}")))?;
            if pairs.iter().any(|(other, _)| *other == name) {
                return Err(Failure::new(format!("{name}: given twice")));
            }
            pairs.push((name, value));
        }
        Ok(Self { pairs })
    }

    /// Refuses every name that is not in `known`.
    ///
    /// # Errors
    /// The first unknown name, with the known ones.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), Failure> {
        match self.pairs.iter().find(|(name, _)| !known.contains(name)) {
            Some((name, _)) => {
                Err(Failure::new(format!("unknown setting {name:?}; known are {}", known.join(", "))))
            }
            None => Ok(()),
        }
    }

    /// The value of `name`, if given.
    pub(crate) fn get(&self, name: &str) -> Option<&'a str> {
        self.pairs.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
    }

    /// As a number.
    ///
    /// # Errors
    /// A value that is none.
    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, Failure> {
        self.get(name).map(|value| text::number(name, value)).transpose()
    }

    /// As a count.
    ///
    /// # Errors
    /// A value that is none.
    pub(crate) fn count(&self, name: &str) -> Result<Option<usize>, Failure> {
        self.get(name).map(|value| text::count(name, value)).transpose()
    }

    /// As bytes, with the suffixes of [`text::bytes`].
    ///
    /// # Errors
    /// A value that is none, or beyond the address space.
    pub(crate) fn bytes(&self, name: &str) -> Result<Option<usize>, Failure> {
        let Some(value) = self.get(name) else { return Ok(None) };
        usize::try_from(text::bytes(name, value)?)
            .map(Some)
            .map_err(|_| Failure::new(format!("{name}: {value} does not fit this machine's addresses")))
    }
}
