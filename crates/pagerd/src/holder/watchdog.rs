//! What a service manager that watches over the service (`WatchdogSec=`) is told, as long as the holder turns and its daemon is heard of. A
//! daemon that is not heard of is killed and replaced in good time: no reason to end the service.

use std::time::{Duration, Instant};

use crate::running::Running;

/// What part of the manager's patience the daemon may take.
const DAEMONS_PART: u32 = 2;
/// How often within it both are heard of.
const OFTEN: u32 = 4;

pub(super) struct Watchdog {
    patience: Duration,
    next: Instant,
}

impl Watchdog {
    /// As `WATCHDOG_USEC` says, where it is said to this process.
    pub(super) fn from_environment() -> Option<Self> {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = std::env::var_os("WATCHDOG_PID").is_none()
            || number("WATCHDOG_PID") == Some(u64::from(std::process::id()));
        let patience = number("WATCHDOG_USEC").filter(|&usec| is_ours && usec > 0)?;
        Some(Self { patience: Duration::from_micros(patience), next: Instant::now() })
    }

    /// How often the daemon is to be heard of.
    pub(super) fn interval(&self) -> Duration {
        self.patience / OFTEN / DAEMONS_PART
    }

    /// Until it is to be looked after.
    pub(super) fn left(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// Whether the manager is to be told, once each time.
    pub(super) fn is_due(&mut self) -> bool {
        let now = Instant::now();
        if now < self.next {
            return false;
        }
        self.next = now + self.interval();
        true
    }

    /// The same; `heard`: nothing of the daemon is left to be read. Kills a daemon that is not heard of.
    pub(super) fn look(&mut self, running: &Running, heard: bool) -> bool {
        if !self.is_due() {
            return false;
        }
        let now = Instant::now();
        // One of an earlier version says nothing of the kind.
        let silent = running.alive_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        if heard && silent > self.patience / DAEMONS_PART {
            crate::log(format_args!(
                "the daemon has not been heard of for {} ms: it is replaced",
                silent.as_millis()
            ));
            let _ = running.process.send_signal(libc::SIGKILL);
        }
        true
    }
}
