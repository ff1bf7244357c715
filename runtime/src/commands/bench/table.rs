//! The ladder as a table for people.

use std::io::{self, Write};

use flashlm::budget::human_bytes;
use serde_json::Value;

use super::free_running::write_line;

/// Writes `report`, with what it is of and where its limits are from.
pub(super) fn write_table(out: &mut impl Write, report: &Value, of: &str, limits: &str) -> io::Result<()> {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let bytes = |value: &Value| human_bytes(number(value) as u64);
    writeln!(
        out,
        "{} of memory for a model of {}, {of}",
        bytes(&report["memory_budget_bytes"]),
        bytes(&report["model_bytes"])
    )?;
    writeln!(
        out,
        "disk {}/s sequential, memory {}/s; {limits}",
        bytes(&report["machine"]["disk_sequential_bytes_per_s"]),
        bytes(&report["machine"]["dram_bytes_per_s"]),
    )?;
    writeln!(
        out,
        "{:<14} {:>9} {:>7} {:>9} {:>8} {:>8} {:>8} {:>11} {:>8} {:>11} {:>6} {:>8} {:>8} {:>9} {:>10}",
        "step",
        "ms/token",
        "spread",
        "p95",
        "I/O wait",
        "planning",
        "compute",
        "read/token",
        "reads",
        "unused",
        "hits",
        "I/O lim.",
        "DRAM l.",
        "distance",
        "peak"
    )?;
    for step in report["steps"].as_array().into_iter().flatten() {
        let name = step["name"].as_str().unwrap_or_default();
        if let Some(reason) = step["not_applicable"].as_str() {
            writeln!(out, "{name:<14} n/a: {reason}")?;
            continue;
        }
        writeln!(
            out,
            "{name:<14} {:>9.2} {:>6.1}% {:>9.2} {:>8.2} {:>8.2} {:>8.2} {:>11} {:>8.0} {:>11} {:>5.1}% {:>8.2} {:>8.2} {:>8.2}x {:>10}",
            number(&step["decode_ms_per_token"]["median"]),
            number(&step["decode_ms_per_token"]["spread"]) * 100.0,
            number(&step["decode_ms_per_token"]["p95"]),
            number(&step["io_wait_ms"]),
            number(&step["planning_ms"]),
            number(&step["compute_ms"]),
            bytes(&step["bytes_read_per_token"]),
            number(&step["reads_per_token"]),
            bytes(&step["unused_prefetch_bytes_per_token"]),
            number(&step["hit_rate"]) * 100.0,
            number(&step["io_limit_ms"]),
            number(&step["dram_limit_ms"]),
            number(&step["distance"]),
            bytes(&step["peak_memory_bytes"]),
        )?;
    }
    report["steps"].as_array().into_iter().flatten().try_for_each(|step| write_line(out, step))?;
    writeln!(
        out,
        "Before `storage_order` every group is one read, about what the checkpoint's own order would give; before `bundling`, two."
    )?;
    Ok(())
}
