//! What a turn cost, in one line.

use flashlm::budget::{counted, human_bytes};
use flashlm::{Percentiles, Report, Session};

/// The figures of a turn, and how full the context is.
pub(super) fn figures(report: &Report, session: &Session<'_>) -> String {
    let mut parts =
        vec![format!("{} read in {:.2} s", counted(report.prompt_tokens, "token"), report.prefill.as_secs_f64())];
    let decoded = report.decode.len();
    if decoded > 0 {
        let ms = Percentiles::of(&report.decode).median;
        let rate = 1e3 / ms.max(1e-9);
        parts.push(format!("{} said at {ms:.1} ms each ({rate:.1}/s)", report.tokens));
        let bytes = report.decode_reads.per_token(decoded).bytes_read_per_token;
        if bytes > 0.0 {
            parts.push(format!("{} read from flash for each", human_bytes(bytes as u64)));
        }
    } else {
        parts.push(format!("{} said", report.tokens));
    }
    if report.speculation.drafted > 0 {
        parts.push(format!("{} of {} guesses came true", report.speculation.accepted, report.speculation.drafted));
    }
    parts.push(format!("context {} of {}", session.len(), session.context()));
    parts.join("; ")
}
