//! Another executable in this daemon's place: one that has been proved, so that nothing ends for one that cannot be started.

use std::path::Path;

use pager::PagerError;
use serde_json::{Value, json};

use crate::channel::{Message, Unfit};
use crate::daemon::Daemon;
use crate::protocol::{self, Upgrade};
use crate::requests::{Answer, Outcome, Refusal, params};

/// A request for one.
struct Asked {
    client: u64,
    request: Value,
    executable: String,
}

/// Those that are not answered yet; the first is being proved.
#[derive(Default)]
pub(crate) struct Upgrades(Vec<Asked>);

impl Daemon {
    pub(crate) fn upgrade(&mut self, client: u64, id: Option<Value>, value: Value) -> Outcome {
        let Upgrade { executable } = params(value)?;
        if !Path::new(&executable).is_absolute() || executable.len() >= libc::PATH_MAX as usize {
            return Err(Refusal::Words {
                code: protocol::INVALID_PARAMS,
                message: format!(
                    "`executable` has to be an absolute path of less than {} bytes",
                    libc::PATH_MAX
                ),
            });
        }
        if self.control.line.is_lost() {
            return Err(no_holder().into());
        }
        if self.stopping.is_some() {
            return Err(ends().into());
        }
        let request = id.unwrap_or_default();
        self.upgrades.0.push(Asked { client, request, executable });
        if self.control.upgrades().is_none() {
            // A holder that proves nothing.
            self.proved(None);
        } else if self.upgrades.0.len() == 1 {
            self.prove_next();
        }
        Ok(Answer::Later)
    }

    /// Has the holder start the first that was asked for, beside this daemon.
    fn prove_next(&mut self) {
        while let Some(Asked { executable, .. }) = self.upgrades.0.first() {
            let prove = Message::Prove { executable: executable.clone() };
            let Err(error) = self.control.line.say(&prove, &[]) else { return };
            let Asked { client, request, .. } = self.upgrades.0.remove(0);
            self.answered(client, &request, Err(error));
        }
    }

    /// What came of the first: with that executable, every request for it is answered.
    pub(crate) fn proved(&mut self, unfit: Option<Unfit>) {
        let Some(Asked { executable, .. }) = self.upgrades.0.first() else { return };
        let executable = executable.clone();
        let same: Vec<Asked> =
            self.upgrades.0.extract_if(.., |asked| asked.executable == executable).collect();
        let stopping = self.stopping.is_some();
        for Asked { client, request, .. } in same {
            match &unfit {
                Some(unfit) => self.refused(client, &request, &executable, unfit),
                None if stopping => self.answered(client, &request, Err(ends())),
                // The answer is on its way before this daemon ends.
                None => self.answered(client, &request, Ok(json!({ "epoch": self.control.epoch }))),
            }
        }
        if unfit.is_none() && !stopping {
            // Without a holder this daemon goes on, which is told.
            let _ = self.control.line.say(&Message::Upgrade { executable }, &[]);
        }
        self.prove_next();
    }

    /// There is no holder any more that would start one.
    pub(crate) fn nobody_upgrades(&mut self) {
        for Asked { client, request, .. } in std::mem::take(&mut self.upgrades.0) {
            self.answered(client, &request, Err(no_holder()));
        }
    }

    fn refused(&mut self, client: u64, request: &Value, executable: &str, unfit: &Unfit) {
        let holder = self.control.holder_pid().unwrap_or_default();
        let Unfit { why, system } = unfit;
        let message = format!("the daemon goes on, because {executable} cannot take its place: {why}");
        let mut data = json!({ "code": "ERR_UFFD_PROTOCOL", "message": message });
        data["hint"] = if let Some((syscall, errno)) = system {
            data["code"] = "ERR_UFFD_SYSTEM".into();
            data["errno"] = (*errno).into();
            data["syscall"] = syscall.as_str().into();
            format!(
                "Name a userfaultfd-pagerd by a path as the daemon's holder (process {holder}) sees it, which may execute it."
            )
        } else {
            format!(
                "Is it a userfaultfd-pagerd, of this version or a newer one? What it has said is on the standard error of \
                 the daemon's holder (process {holder})."
            )
        }
        .into();
        let error = json!({ "code": protocol::FAILED, "message": message, "data": data });
        self.reply(client, &json!({ "jsonrpc": "2.0", "id": request, "error": error }));
    }
}

fn no_holder() -> PagerError {
    PagerError::Inherited {
        message: "the holder, which would start it, is gone".to_owned(),
        code: "ERR_UFFD_PAGER_LOST",
    }
}

fn ends() -> PagerError {
    PagerError::Inherited {
        message: "the daemon is ending: nothing takes its place".to_owned(),
        code: "ERR_UFFD_PAGER_LOST",
    }
}
