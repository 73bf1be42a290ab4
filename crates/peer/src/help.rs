//! The text of `--help`: the reference of the command line and of the commands.

/// Printed as it is.
pub(crate) const HELP: &str = "\
userfaultfd-peer: a process whose memory somebody else fills, as Firecracker when it restores a snapshot.

It maps its memory, registers it with a userfaultfd, hands both over on a Unix socket, and then obeys
commands on standard input. Every answer is one JSON line on standard output. What cannot be done at start is
one line on standard error and status 2.

Usage: userfaultfd-peer (--socket PATH | --no-connect) --region SIZE[:OFFSET]... [options]

Memory (bytes; K, M and G are accepted)
  --region SIZE[:OFFSET]  one region, at image offset OFFSET (default: where the region before it ends);
                          repeatable. A page without access rights lies on either side of each
  --reverse               let the addresses descend in the order of the regions
  --page-size BYTES       4096 (default) or 2097152 (huge pages; the pool must not be empty)
  --memfd                 map one memfd, shared, in which the regions lie one behind the other as given

The userfaultfd (default: /dev/userfaultfd, or the system call where that does not open)
  --syscall               the system call only
  --user-mode-only        only faults of user mode; inside system calls they are EFAULT
  --features HEX          features to ask for (default: 8, EVENT_REMOVE)
  --modes NAMES           missing (default), minor, write-protect, with commas between: which faults to register for
  --no-register           leave the memory unregistered

The handshake
  --socket PATH           where to connect
  --no-connect            neither connect nor send; the options below then have no use
  --fields v1.1|v1.7|v1.12  the members of that Firecracker version (default: v1.12)
  --extra-field           one unknown member more in every region
  --json TEXT             this text; {base0}, {size0}, {offset0}, {base1}... become the real numbers
  --trailing TEXT         bytes behind the JSON
  --pieces N              N messages, each sent when the one before has been received (default: 1)
  --fd-piece K            which of them carries the descriptor, from 0 (default: 0)
  --fd KIND               uffd (default); none; null (/dev/null); pipe (its reading end); blocking (created
                          without O_NONBLOCK); no-api (a second userfaultfd before UFFDIO_API); two (the
                          userfaultfd and /dev/null); memfd (the userfaultfd and the memfd). The memory is
                          registered with the real one in each case
  --hang-up-after N       send no more than N bytes, and the descriptor only if its piece is reached; close
  --close                 close the connection after the handshake (default: keep it open)

The process
  --cpu N                 run on this CPU only
  --help                  print this

First line: {\"event\":\"ready\",\"pid\":,\"regions\":[{\"base\":\"0x\",\"size\":,\"offset\":,\"page_size\":}],\"resident\":},
printed when the connection stands and before anything is sent; resident counts pages.

Commands (offsets are image offsets; times are nanoseconds)
  touch [order=sequential|random] [seed=1] [threads=1] [stride=PAGE] [limit=PAGES]
        [access=load|store] [offset=BYTES]
      load 8 bytes of each page, in image order or shuffled; with a stride only of every page that many bytes
      apart, from the offset on; with access=store, store them as they are; answers pages, bytes (of
      those pages), first_ns (the first one), median_ns, p99_ns, max_ns, total_ns
  hash [skip-discarded]   SHA-256 of all regions in image order: sha256, bytes, ns
  read OFFSET LEN         up to 65536 bytes: hex
  write OFFSET HEX        store bytes: bytes
  discard OFFSET LEN      madvise(MADV_DONTNEED; of a memfd, MADV_REMOVE) of whole pages: ns
  discard-random count=RUNS [pages=1] [seed=1]
      discard that many runs of pages, which may overlap: pages (each once), ns
  zeros                   look at each page discarded so far: pages, nonzero, first_bad (offset of a byte)
  compare PATH            compare all other pages with a file: pages, different, first_bad
  resident                pages, rss_kib
  probe OFFSET            let the kernel load from the page: result \"ok\" and hex, or \"efault\"
  fork                    fork: pid. The child waits for commands of its own; there is one at a time
  child COMMAND...        any command, carried out by the child: its answer
  join                    let the child go on to the end of its commands: status or signal
  exit [STATUS]           exit; so does the end of the input, with 0
A command that cannot be done answers with a member error. Poisoned memory kills by SIGBUS, except in probe.
";
