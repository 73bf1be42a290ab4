//! The command line.

use std::path::PathBuf;

pub(crate) const USAGE: &str = "\
userfaultfd-pagerd: serves page faults of other processes, in a process that outlives its clients.

usage: userfaultfd-pagerd --socket PATH [--takeover on|off] [--allow-uid UID]...

  --socket PATH      where clients connect; mode 0600, in a directory that only its owner can change. Without it, the
                     first descriptor that a service manager has passed (LISTEN_FDS)
  --takeover on|off  whether a daemon that dies is replaced by a new one that goes on with its sessions (default: on);
                     with `off`, they meet their failure policy
  --allow-uid UID    another user whose processes may connect; may be given again
  --version          prints the version
";

/// What the holder is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Absent where the socket is inherited.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) takeover: bool,
    pub(crate) allow: Vec<u32>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Holder(Options),
    /// Started by the holder, with its end of the line.
    Daemon(i32),
    Version,
    Help,
}

/// # Errors
///
/// What is wrong, in words.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Role, String> {
    let mut options = Options { socket: None, takeover: true, allow: Vec::new() };
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
        let expected =
            Options { socket: Some("/run/p.sock".into()), takeover: false, allow: vec![1000, 1001] };

        assert_eq!(
            parsed("--socket /run/p.sock --takeover off --allow-uid 1000 --allow-uid 1001"),
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
        assert_eq!(parsed("serve"), Err("\"serve\" is not known".to_owned()));
    }
}
