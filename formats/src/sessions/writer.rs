//! A session to a file.

use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use serde_json::json;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{ARITHMETIC, CONVERSATION, IDS, KV, LENGTH_BYTES, PIECE_BYTES, SavedSession, VERSION};
use crate::destination::{Destination, DestinationError, SESSION_FORMAT};
use crate::seal::{SEAL, seal_head};

/// Takes bytes.
type Take<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

/// Writes a session; `planes` gives the rows of each plane in turn.
///
/// # Errors
/// What the destination has against it.
///
/// # Panics
/// If a plane has not as many bytes as `session` says.
pub fn write_session(
    destination: Destination,
    session: &SavedSession,
    planes: &mut dyn FnMut(usize, Take<'_>) -> io::Result<()>,
) -> Result<(), DestinationError> {
    let written = write(&destination, session, planes);
    written.map_err(|error| destination.failed(error))?;
    destination.publish()
}

fn write(
    destination: &Destination,
    session: &SavedSession,
    planes: &mut dyn FnMut(usize, Take<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let ids: Vec<u8> = session.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let arithmetic: Vec<u8> = session.in_piece.iter().map(|piece| u8::from(*piece)).collect();
    let conversation = session.conversation.as_deref().unwrap_or_default().as_bytes();
    let mut head = head(session, ids.len(), arithmetic.len());
    let mut out = BufWriter::with_capacity(PIECE_BYTES, destination.file());
    out.write_all(&head)?;
    out.write_all(&ids)?;
    out.write_all(&arithmetic)?;
    out.write_all(conversation)?;
    let mut hash = Xxh3::new();
    for plane in 0..session.planes {
        let mut bytes = 0;
        planes(plane, &mut |rows| {
            bytes += rows.len();
            hash.update(rows);
            out.write_all(rows)
        })?;
        assert_eq!(bytes, session.plane_bytes(), "plane {plane}");
    }
    out.flush()?;
    drop(out);
    let conversation = session.conversation.is_some().then(|| xxh3_64(conversation));
    let hashes = [xxh3_64(&ids), xxh3_64(&arithmetic)].into_iter().chain(conversation).chain([hash.digest()]);
    seal_head(&mut head, &hashes.collect::<Vec<_>>());
    destination.file().write_all_at(&head, 0)
}

/// Everything before the tensors, not sealed yet.
fn head(session: &SavedSession, ids: usize, arithmetic: usize) -> Vec<u8> {
    let SavedSession { origin, planes, row_bytes, in_piece, .. } = session;
    let (computed, text) = (in_piece.len(), ids + arithmetic);
    let kv = text + session.conversation.as_ref().map_or(0, String::len);
    let seal = SEAL;
    let mut header = json!({
        "__metadata__": {
            "format": SESSION_FORMAT,
            "version": VERSION.to_string(),
            "bundle": format!("{:016x}", origin.bundle),
            "kv": origin.kv,
            "predicted": origin.predicted.to_string(),
            "instructions": origin.instructions,
            seal.0: seal.1,
        },
        IDS: { "dtype": "U32", "shape": [session.ids.len()], "data_offsets": [0, ids] },
        ARITHMETIC: { "dtype": "U8", "shape": [computed], "data_offsets": [ids, text] },
        KV: { "dtype": "U8", "shape": [planes, computed, row_bytes], "data_offsets": [kv, kv + planes * session.plane_bytes()] },
    });
    if session.conversation.is_some() {
        header[CONVERSATION] = json!({ "dtype": "U8", "shape": [kv - text], "data_offsets": [text, kv] });
    }
    let mut json = header.to_string().into_bytes();
    // Tensors begin at a multiple of eight.
    json.resize((json.len() + LENGTH_BYTES).next_multiple_of(8) - LENGTH_BYTES, b' ');
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json);
    head
}
