//! The command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) const USAGE: &str = "\
userfaultfd-pagerd: serves page faults of other processes, in a process that outlives its clients.

usage: userfaultfd-pagerd --socket PATH [--takeover on|off] [--allow-uid UID]... [--confine all|calls|off]

  --socket PATH      where clients connect; mode 0600, in a directory that only its owner can change. Without it, the
                     one socket that a service manager has passed (LISTEN_FDS)
  --takeover on|off  whether a daemon that dies is replaced by a new one that goes on with its sessions (default: on);
                     with `off`, they meet their failure policy
  --allow-uid UID    another user whose processes may connect; may be given again. The socket of --socket is mode 0666 then:
                     its directory says who reaches it, and who connects has to be one of these users
  --confine all|calls|off
                     what holder and daemon give up: `all` (default) files (Landlock) and system calls (seccomp), the daemon
                     all that serving does not take; `calls`: seccomp alone
  --version          prints the version
";

/// What the holder is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Absent where the socket is inherited.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) takeover: bool,
    pub(crate) allow: Vec<u32>,
    pub(crate) confine: Confinement,
}

/// What holder and daemon give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Confinement {
    /// The file system, and system calls.
    #[default]
    All,
    /// System calls.
    Calls,
    /// Nothing.
    Off,
}

impl Confinement {
    fn of(word: &str) -> Result<Self, String> {
        match word {
            "all" => Ok(Self::All),
            "calls" => Ok(Self::Calls),
            "off" => Ok(Self::Off),
            other => Err(format!("--confine is all, calls or off, not {other:?}")),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Holder(Options),
    /// Started by the holder, with its end of the line.
    Daemon(i32),
    /// Says what holder and daemon could not do.
    TryConfinement(Confinement),
    Version,
    Help,
}

/// # Errors
///
/// What is wrong, in words.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Role, String> {
    let mut options = Options { socket: None, takeover: true, allow: Vec::new(), confine: Confinement::All };
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--socket" => options.socket = Some(value()?.into()),
            "--takeover" => {
                options.takeover = match value()?.as_str() {
                    "on" => true,
                    "off" => false,
                    other => return Err(format!("--takeover is on or off, not {other:?}")),
                };
            }
            "--allow-uid" => {
                let uid = value()?;
                options
                    .allow
                    .push(uid.parse().map_err(|_| format!("--allow-uid: {uid:?} is no user's number"))?);
            }
            "--confine" => options.confine = Confinement::of(&value()?)?,
            "--try-confinement" => return Confinement::of(&value()?).map(Role::TryConfinement),
            "--daemon" => {
                let fd = value()?;
                return fd
                    .parse()
                    .map(Role::Daemon)
                    .map_err(|_| format!("--daemon: {fd:?} is no descriptor"));
            }
            "--version" => return Ok(Role::Version),
            "--help" | "-h" => return Ok(Role::Help),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(Role::Holder(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Role, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_read() {
        let expected = Options {
            socket: Some("/run/p.sock".into()),
            takeover: false,
            allow: vec![1000, 1001],
            confine: Confinement::Calls,
        };

        assert_eq!(
            parsed("--socket /run/p.sock --takeover off --allow-uid 1000 --allow-uid 1001 --confine calls"),
            Ok(Role::Holder(expected))
        );
        assert_eq!(parsed("--daemon 3"), Ok(Role::Daemon(3)));
        assert_eq!(parsed("--version"), Ok(Role::Version));
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(parsed("--socket"), Err("--socket needs a value".to_owned()));
        assert_eq!(parsed("--takeover maybe"), Err("--takeover is on or off, not \"maybe\"".to_owned()));
        assert_eq!(parsed("--allow-uid me"), Err("--allow-uid: \"me\" is no user's number".to_owned()));
        assert_eq!(parsed("--confine x"), Err("--confine is all, calls or off, not \"x\"".to_owned()));
        assert_eq!(parsed("serve"), Err("\"serve\" is not known".to_owned()));
    }
}
