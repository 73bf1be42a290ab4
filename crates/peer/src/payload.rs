//! The text of the handshake: what serde_json makes of Firecracker's region mappings, member for member.

use crate::args::{Fields, Handshake};
use crate::json::{Object, array};
use crate::memory::Memory;

/// An unknown member that a reader counting brackets or quotes would stumble over.
const UNKNOWN_VALUE: &str = r#"{"note":"]}\"","list":[[1],[]]}"#;

/// Everything that goes over the socket, as one text.
pub(crate) fn text(handshake: &Handshake, memory: &Memory) -> String {
    let json = match &handshake.json {
        Some(template) => filled(template, memory),
        None => regions(handshake, memory),
    };
    json + &handshake.trailing
}

fn regions(handshake: &Handshake, memory: &Memory) -> String {
    let page_size = memory.page_size() as u64;
    let objects: Vec<String> = memory
        .regions()
        .iter()
        .map(|region| {
            let mut object = Object::new()
                .number("base_host_virt_addr", region.base as u64)
                .number("size", region.size as u64)
                .number("offset", region.offset);
            if handshake.fields == Fields::V1_12 {
                object = object.number("page_size", page_size);
            }
            if handshake.fields != Fields::V1_1 {
                // Bytes, whatever the name says: all released versions send them.
                object = object.number("page_size_kib", page_size);
            }
            if handshake.extra_field {
                object = object.raw("unknown_to_all_versions", UNKNOWN_VALUE);
            }
            object.finish()
        })
        .collect();
    array(&objects)
}

/// Replaces `{base0}` and its like. Braces around anything else are the JSON's own.
fn filled(template: &str, memory: &Memory) -> String {
    let mut text = template.to_owned();
    for (index, region) in memory.regions().iter().enumerate() {
        text = text
            .replace(&format!("{{base{index}}}"), &region.base.to_string())
            .replace(&format!("{{size{index}}}"), &region.size.to_string())
            .replace(&format!("{{offset{index}}}"), &region.offset.to_string());
    }
    text
}
