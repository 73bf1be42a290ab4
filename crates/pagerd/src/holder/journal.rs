//! What is kept, written down as it changes: lines of JSON in a memfd that outlives this process in the service manager's store.
//!
//! A line is whole or it is the last one, which was being written when its process was killed: nothing that it says has been done.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde_json::Value;
use uffd::fd_passing::in_memfd;

/// The first line. Its number changes where an older holder could not go on.
const HEAD: &str = "{\"userfaultfd-pagerd\":\"kept\",\"version\":1}\n";
/// It is written anew when so much has been added, and more than there was.
const LONG: u64 = 1 << 20;

/// Something that has changed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Entry<'a> {
    /// Kept from now on, in the place of what has had this key; with its descriptors' numbers in the store, where they are there.
    Keep { key: Cow<'a, str>, value: Cow<'a, Value>, fds: Option<Cow<'a, [u64]>> },
    /// Its descriptors are in the store from now on.
    Stored { key: Cow<'a, str>, fds: Cow<'a, [u64]> },
    /// Not kept any more.
    Forget { key: Cow<'a, str> },
    /// It is over, and its descriptors stay until its process has ended.
    Lingers { key: Cow<'a, str>, value: Cow<'a, Value>, fds: Option<Cow<'a, [u64]>> },
    /// A daemon has been started: its number, and which process it is.
    Daemon { epoch: u64, pid: i32, started: Option<u64> },
}

impl Entry<'static> {
    /// `None` where it is not understood.
    fn read(line: &[u8]) -> Option<Self> {
        let Value::Object(line) = serde_json::from_slice(line).ok()? else { return None };
        let (kind, mut said) = line.into_iter().next()?;
        let key = |said: &Value| said["key"].as_str().map(|key| Cow::Owned(key.to_owned()));
        let fds = |said: &Value| -> Option<Vec<u64>> {
            said["fds"].as_array()?.iter().map(Value::as_u64).collect()
        };
        Some(match kind.as_str() {
            "keep" | "lingers" => {
                let (key, fds) = (key(&said)?, fds(&said).map(Cow::Owned));
                let value = Cow::Owned(said.get_mut("value")?.take());
                if kind == "keep" {
                    Self::Keep { key, value, fds }
                } else {
                    Self::Lingers { key, value, fds }
                }
            }
            "stored" => Self::Stored { key: key(&said)?, fds: Cow::Owned(fds(&said)?) },
            "forget" => Self::Forget { key: key(&said)? },
            "daemon" => Self::Daemon {
                epoch: said["epoch"].as_u64()?,
                pid: said["pid"].as_i64()? as i32,
                started: said["started"].as_u64(),
            },
            _ => return None,
        })
    }
}

/// One of them, by its number: a longer one takes the place of the one before it.
pub(crate) struct Journal {
    file: File,
    pub(crate) number: u64,
    len: u64,
    /// Bytes when it was made.
    first: u64,
}

impl Journal {
    /// One that begins with these.
    ///
    /// # Errors
    ///
    /// No descriptor, or no memory.
    pub(crate) fn create(number: u64, entries: &[Entry<'_>]) -> io::Result<Self> {
        let mut text = HEAD.as_bytes().to_vec();
        for entry in entries {
            push(&mut text, entry)?;
        }
        let file = File::from(in_memfd(c"uffd-journal", &text)?);
        let len = text.len() as u64;
        Ok(Self { file, number, len, first: len })
    }

    /// One that an earlier process has written, and everything in it.
    ///
    /// # Errors
    ///
    /// Why it is not understood, in words.
    pub(crate) fn open(number: u64, fd: OwnedFd) -> Result<(Self, Vec<Entry<'static>>), String> {
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let file = File::from(fd);
        let mut text = vec![0; file.metadata().map_err(|error| words(&error))?.len() as usize];
        file.read_exact_at(&mut text, 0).map_err(|error| words(&error))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut lines = text.get(..whole).unwrap_or_default().split_inclusive(|&byte| byte == b'\n');
        if lines.next() != Some(HEAD.as_bytes()) {
            return Err("it is of another version".to_owned());
        }
        let entries = lines.map(Entry::read).collect::<Option<_>>();
        let entries = entries.ok_or("there is a line in it that another version has written")?;
        let len = whole as u64;
        file.set_len(len).map_err(|error| words(&error))?;
        Ok((Self { file, number, len, first: len }, entries))
    }

    /// Adds these, all of them by one write(2).
    ///
    /// # Errors
    ///
    /// No memory: what is in it is as before.
    pub(crate) fn append(&mut self, entries: &[Entry<'_>]) -> io::Result<()> {
        let mut text = Vec::new();
        for entry in entries {
            push(&mut text, entry)?;
        }
        if let Err(error) = self.file.write_all_at(&text, self.len) {
            // A part of it would be the beginning of the next.
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.len += text.len() as u64;
        Ok(())
    }

    /// Whether it is to be written anew.
    pub(crate) fn is_long(&self) -> bool {
        self.len - self.first > LONG.max(self.first)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn push(text: &mut Vec<u8>, entry: &Entry<'_>) -> io::Result<()> {
    serde_json::to_writer(&mut *text, entry)?;
    text.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keep(key: &str) -> Entry<'_> {
        Entry::Keep {
            key: key.into(),
            value: Cow::Owned(json!({ "line": "a\nb" })),
            fds: Some(vec![1].into()),
        }
    }

    fn reopened(journal: &Journal) -> Result<Vec<String>, String> {
        let (_, entries) = Journal::open(7, journal.as_fd().try_clone_to_owned().unwrap())?;
        Ok(entries.iter().map(|entry| serde_json::to_string(entry).unwrap()).collect())
    }

    #[test]
    fn what_was_written_is_read_again_up_to_a_line_that_is_not_whole() {
        let mut journal = Journal::create(1, &[keep("first")]).unwrap();
        journal.append(&[keep("second"), Entry::Forget { key: "first".into() }]).unwrap();
        let whole = reopened(&journal).unwrap();
        assert_eq!(whole.len(), 3);
        assert_eq!(whole[1], r#"{"keep":{"key":"second","value":{"line":"a\nb"},"fds":[1]}}"#);

        // Its process is killed within a write.
        journal.file.write_all_at(br#"{"forget":{"key":"sec"#, journal.len).unwrap();

        assert_eq!(reopened(&journal).unwrap(), whole);
        let (mut again, _) = Journal::open(1, journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
        again.append(&[Entry::Forget { key: "second".into() }]).unwrap();
        assert_eq!(reopened(&again).unwrap()[3], r#"{"forget":{"key":"second"}}"#);
    }

    #[test]
    fn one_of_another_version_is_refused_as_a_whole() {
        let other = |text: &[u8]| Journal::open(1, in_memfd(c"other", text).unwrap()).map(drop);

        assert_eq!(other(b""), Err("it is of another version".to_owned()));
        assert!(other(b"{\"userfaultfd-pagerd\":\"kept\",\"version\":2}\n").is_err());
        assert!(other(format!("{HEAD}{{\"later\":{{}}}}\n").as_bytes()).is_err());
    }

    #[test]
    fn one_that_has_become_long_is_to_be_written_anew() {
        let mut journal = Journal::create(1, &[]).unwrap();
        let long = "k".repeat(1000);
        let mut written = 0;
        while !journal.is_long() {
            journal.append(&[Entry::Forget { key: long.as_str().into() }]).unwrap();
            written += 1000;
        }
        assert!((1_000_000..1_100_000).contains(&written));
    }
}
