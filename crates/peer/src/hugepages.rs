//! Whether huge pages can be had at all. The mapping itself succeeds with an empty pool, because it reserves
//! nothing, and the first installed page would then fail in the pager, far from the cause.

use std::fs;

use crate::failure::Failure;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Refuses to start where no page of 2 MiB is free and the kernel may not make one.
///
/// # Errors
/// An empty pool, or a kernel without one.
pub(crate) fn check_pool() -> Result<(), Failure> {
    let (free, reserved) = (value("free_hugepages")?, value("resv_hugepages")?);
    let growth = value("nr_overcommit_hugepages")?.saturating_sub(value("surplus_hugepages")?);
    if free > reserved || growth > 0 {
        return Ok(());
    }
    Err(Failure::new(format!(
        "--page-size 2097152: the pool of huge pages is empty (free_hugepages {free}, resv_hugepages {reserved} \
         in {POOL}); write a count to nr_hugepages there"
    )))
}

fn value(name: &str) -> Result<u64, Failure> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).map_err(|error| Failure::io(format!("read of {path}"), &error))?;
    crate::text::number(&path, text.trim())
}
