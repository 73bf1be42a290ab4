//! What is brought without a fault, as TypeScript names it.

use pager::{FillMode, FillOptions};

pub(crate) fn fill_of(mode: &str, collapse: bool) -> FillOptions {
    let mode = match mode {
        "fill" => FillMode::Fill,
        "huge-fill" => FillMode::HugeFill,
        "replay" => FillMode::Replay,
        _ => FillMode::Windows,
    };
    FillOptions { mode, collapse }
}
