//! The command line: words to [`Options`], everything checked before the first system call.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::failure::Failure;
use crate::memory::{BASE_PAGE, RegionSpec};
use crate::text;
use crate::uffd::{Creation, FEATURE_EVENT_REMOVE, Modes};

const HUGE_PAGE: usize = 2 << 20;
/// The most that Linux can be built for.
const MOST_CPUS: usize = 8192;

/// What the program is to do.
pub(crate) enum Request {
    /// Print the help.
    Help,
    /// Be a peer.
    Run(Box<Options>),
}

/// A checked command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Regions in the given order: at least one, no two at the same image bytes.
    pub(crate) regions: Vec<RegionSpec>,
    /// Bytes: 4096 or 2 MiB.
    pub(crate) page_size: usize,
    /// Addresses descend.
    pub(crate) reverse: bool,
    /// How to make the userfaultfd.
    pub(crate) creation: Creation,
    /// Map a memfd, shared, in which the regions lie one behind the other.
    pub(crate) memfd: bool,
    /// Register the memory for these faults; for none, not at all.
    pub(crate) modes: Modes,
    /// Where to connect; `None` with `--no-connect`.
    pub(crate) socket: Option<PathBuf>,
    /// What to send there.
    pub(crate) handshake: Handshake,
    /// The only CPU to run on.
    pub(crate) cpu: Option<usize>,
}

/// What is sent, and how.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// Members of a region.
    pub(crate) fields: Fields,
    /// One unknown member more.
    pub(crate) extra_field: bool,
    /// Text instead of the real JSON.
    pub(crate) json: Option<String>,
    /// Text behind the JSON.
    pub(crate) trailing: String,
    /// Number of messages, at least 1.
    pub(crate) pieces: usize,
    /// The message with the descriptor, below `pieces`.
    pub(crate) fd_piece: usize,
    /// The descriptor.
    pub(crate) descriptor: Descriptor,
    /// Close after that many bytes.
    pub(crate) hang_up_after: Option<usize>,
    /// Close after the handshake.
    pub(crate) close: bool,
}

/// The Firecracker versions that changed the members of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fields {
    /// Address, size, offset.
    V1_1,
    /// And `page_size_kib`, which holds bytes.
    V1_7,
    /// And `page_size` before it.
    V1_12,
}

/// What rides in SCM_RIGHTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// The userfaultfd.
    Uffd,
    /// Nothing.
    None,
    /// /dev/null.
    Null,
    /// The userfaultfd, created without O_NONBLOCK.
    Blocking,
    /// Another userfaultfd, before UFFDIO_API.
    NoApi,
    /// The reading end of a pipe.
    Pipe,
    /// The userfaultfd and /dev/null.
    Two,
    /// The userfaultfd and the memfd.
    Memfd,
}

/// Reads the words behind the program's name.
///
/// # Errors
/// An unknown or repeated option, a missing or refused value, regions that contradict each other.
pub(crate) fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Request, Failure> {
    let mut options = Options::new();
    let mut regions = Vec::new();
    let mut connect = true;
    let mut seen = HashSet::new();
    while let Some(word) = words.next() {
        let name = word.to_string_lossy().into_owned();
        if name != "--region" && !seen.insert(name.clone()) {
            return Err(Failure::new(format!("{name}: given twice")));
        }
        let mut path =
            || words.next().ok_or_else(|| Failure::new(format!("{name}: expected a value behind it")));
        let mut value = || {
            path()?
                .into_string()
                .map_err(|word| Failure::new(format!("{name}: expected UTF-8, got {word:?}")))
        };
        let handshake = &mut options.handshake;
        match name.as_str() {
            "--help" => return Ok(Request::Help),
            "--region" => regions.push(value()?),
            "--reverse" => options.reverse = true,
            "--page-size" => options.page_size = page_size(&name, &value()?)?,
            "--syscall" => options.creation.syscall = true,
            "--user-mode-only" => options.creation.user_mode_only = true,
            "--features" => options.creation.features = features(&name, &value()?)?,
            "--memfd" => options.memfd = true,
            "--modes" => options.modes = modes(&name, &value()?)?,
            "--no-register" => options.modes = Modes::NONE,
            "--socket" => options.socket = Some(path()?.into()),
            "--no-connect" => connect = false,
            "--fields" => handshake.fields = fields(&name, &value()?)?,
            "--extra-field" => handshake.extra_field = true,
            "--json" => handshake.json = Some(value()?),
            "--trailing" => handshake.trailing = value()?,
            "--pieces" => handshake.pieces = text::count(&name, &value()?)?,
            "--fd-piece" => handshake.fd_piece = text::count(&name, &value()?)?,
            "--fd" => handshake.descriptor = descriptor(&name, &value()?)?,
            "--hang-up-after" => handshake.hang_up_after = Some(text::count(&name, &value()?)?),
            "--close" => handshake.close = true,
            "--cpu" => options.cpu = Some(text::count(&name, &value()?)?),
            _ => return Err(Failure::new(format!("unknown option {name:?}; --help lists them"))),
        }
    }
    options.regions = specs(&regions, options.page_size)?;
    check(&options, connect)?;
    if !connect {
        options.socket = None;
    }
    Ok(Request::Run(Box::new(options)))
}

impl Options {
    fn new() -> Self {
        Self {
            regions: Vec::new(),
            page_size: BASE_PAGE,
            reverse: false,
            creation: Creation { syscall: false, user_mode_only: false, features: FEATURE_EVENT_REMOVE },
            memfd: false,
            modes: Modes::MISSING,
            socket: None,
            handshake: Handshake {
                fields: Fields::V1_12,
                extra_field: false,
                json: None,
                trailing: String::new(),
                pieces: 1,
                fd_piece: 0,
                descriptor: Descriptor::Uffd,
                hang_up_after: None,
                close: false,
            },
            cpu: None,
        }
    }
}

/// What only the whole command line can show.
fn check(options: &Options, connect: bool) -> Result<(), Failure> {
    let Handshake { pieces, fd_piece, .. } = options.handshake;
    if options.regions.is_empty() {
        return Err(Failure::new("--region: at least one is needed"));
    }
    if connect && options.socket.is_none() {
        return Err(Failure::new("--socket: needed unless --no-connect is given"));
    }
    if pieces == 0 {
        return Err(Failure::new("--pieces: expected at least 1, got 0"));
    }
    if options.memfd && options.page_size != BASE_PAGE {
        return Err(Failure::new("--memfd: has ordinary pages, not those of --page-size"));
    }
    if options.handshake.descriptor == Descriptor::Memfd && !options.memfd {
        return Err(Failure::new("--fd memfd: there is none without --memfd"));
    }
    if let Some(cpu) = options.cpu.filter(|cpu| *cpu >= MOST_CPUS) {
        return Err(Failure::new(format!("--cpu: expected less than {MOST_CPUS}, got {cpu}")));
    }
    if fd_piece >= pieces {
        return Err(Failure::new(format!(
            "--fd-piece: expected less than --pieces ({pieces}), got {fd_piece}"
        )));
    }
    Ok(())
}

fn page_size(name: &str, value: &str) -> Result<usize, Failure> {
    match usize::try_from(text::bytes(name, value)?) {
        Ok(size @ (BASE_PAGE | HUGE_PAGE)) => Ok(size),
        _ => Err(Failure::new(format!("{name}: expected {BASE_PAGE} or {HUGE_PAGE}, got {value:?}"))),
    }
}

fn features(name: &str, value: &str) -> Result<u64, Failure> {
    u64::from_str_radix(value.trim_start_matches("0x"), 16)
        .map_err(|_| Failure::new(format!("{name}: expected a hexadecimal number, got {value:?}")))
}

fn modes(name: &str, value: &str) -> Result<Modes, Failure> {
    value.split(',').try_fold(Modes::NONE, |modes, mode| match mode {
        "missing" => Ok(modes.and(Modes::MISSING)),
        "minor" => Ok(modes.and(Modes::MINOR)),
        "write-protect" => Ok(modes.and(Modes::WRITE_PROTECT)),
        _ => Err(Failure::new(format!(
            "{name}: expected missing, minor, write-protect or some of them with commas between, got {value:?}"
        ))),
    })
}

fn fields(name: &str, value: &str) -> Result<Fields, Failure> {
    match value {
        "v1.1" => Ok(Fields::V1_1),
        "v1.7" => Ok(Fields::V1_7),
        "v1.12" => Ok(Fields::V1_12),
        _ => Err(Failure::new(format!("{name}: expected v1.1, v1.7 or v1.12, got {value:?}"))),
    }
}

fn descriptor(name: &str, value: &str) -> Result<Descriptor, Failure> {
    match value {
        "uffd" => Ok(Descriptor::Uffd),
        "none" => Ok(Descriptor::None),
        "null" => Ok(Descriptor::Null),
        "blocking" => Ok(Descriptor::Blocking),
        "no-api" => Ok(Descriptor::NoApi),
        "pipe" => Ok(Descriptor::Pipe),
        "two" => Ok(Descriptor::Two),
        "memfd" => Ok(Descriptor::Memfd),
        _ => Err(Failure::new(format!(
            "{name}: expected uffd, none, null, blocking, no-api, pipe, two or memfd, got {value:?}"
        ))),
    }
}

/// Resolves the offsets that were left out and refuses regions that share image bytes, for which `read`
/// and `hash` would have two answers.
fn specs(values: &[String], page_size: usize) -> Result<Vec<RegionSpec>, Failure> {
    let mut specs: Vec<RegionSpec> = Vec::with_capacity(values.len());
    let mut next_offset = 0;
    for value in values {
        let name = format!("--region {value}");
        let (size, offset) = match value.split_once(':') {
            Some((size, offset)) => (size, text::bytes(&name, offset)?),
            None => (value.as_str(), next_offset),
        };
        let size = text::bytes(&name, size)?;
        if size == 0 || !size.is_multiple_of(page_size as u64) || !offset.is_multiple_of(page_size as u64) {
            return Err(Failure::new(format!(
                "{name}: size and offset have to be multiples of the page size ({page_size}), the size above 0"
            )));
        }
        let end = offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok());
        let (Some(end), Ok(size)) = (end, usize::try_from(size)) else {
            return Err(Failure::new(format!("{name}: ends beyond any file or address")));
        };
        if specs.iter().any(|other| offset < other.offset + other.size as u64 && other.offset < end) {
            return Err(Failure::new(format!("{name}: overlaps the image bytes of a region before it")));
        }
        specs.push(RegionSpec { size, offset });
        next_offset = end;
    }
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(OsString::from)) {
            Ok(Request::Run(options)) => Ok(*options),
            Ok(Request::Help) => Err("help".into()),
            Err(failure) => Err(failure.to_string()),
        }
    }

    #[test]
    fn a_region_without_an_offset_begins_where_the_one_before_ends() {
        let options = run("--no-connect --region 8K --region 4K:1M --region 4096").unwrap();

        assert_eq!(
            options.regions.iter().map(|spec| spec.offset).collect::<Vec<_>>(),
            [0, 1 << 20, (1 << 20) + 4096]
        );
    }

    #[test]
    fn huge_pages_change_what_regions_may_look_like() {
        assert!(run("--no-connect --region 4M --page-size 2M").is_ok());
        assert!(run("--no-connect --page-size 2097152 --region 4K").unwrap_err().contains("2097152"));
    }

    #[test]
    fn every_contradiction_names_its_option() {
        for (line, named) in [
            ("--no-connect", "--region"),
            ("--region 4K", "--socket"),
            ("--no-connect --region 0", "--region 0"),
            ("--no-connect --region 4097", "--region 4097"),
            ("--no-connect --region 4K:100", "--region 4K:100"),
            ("--no-connect --region 8K --region 4K:4K", "--region 4K:4K"),
            ("--no-connect --region 4K:9223372036854771712", "--region 4K:9223372036854771712"),
            ("--no-connect --region 4K --page-size 8192", "--page-size"),
            ("--no-connect --region 4K --pieces 0", "--pieces"),
            ("--no-connect --region 4K --pieces 2 --fd-piece 2", "--fd-piece"),
            ("--no-connect --region 4K --fields v1.2", "--fields"),
            ("--no-connect --region 4K --fd socket", "--fd"),
            ("--no-connect --region 4K --fd memfd", "--fd memfd"),
            ("--no-connect --region 2M --memfd --page-size 2M", "--memfd"),
            ("--no-connect --region 4K --modes missing,major", "--modes"),
            ("--no-connect --region 4K --features xyz", "--features"),
            ("--no-connect --region 4K --close --close", "--close"),
            ("--no-connect --region 4K --cpu", "--cpu"),
            ("--no-connect --region 4K --cpu 18446744073709551615", "--cpu"),
            ("--no-connect --region 4K --colour", "--colour"),
        ] {
            let message = run(line).expect_err(line);

            assert!(message.contains(named), "{line}: {message}");
        }
    }
}
