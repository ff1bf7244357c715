//! The engine proper: turns requests into device reads, continues short ones, repeats failed ones, watches the
//! clock, and owns the slots. How a read is carried out is the transport's affair.
//!
//! After warm-up neither `submit` nor `wait` allocates: requests and pieces live in pools that only grow to the
//! most ever in flight, and each read in flight has its own array of stretches.

#![expect(unsafe_code, reason = "gives memory to the transport until its reads are done")]

use std::io;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::transport::{Finished, IoVec, Operation, Transport, read_now};
use crate::{AlignedMemory, Completion, Counters, DirectFile, IoError, Piece, ReadBatch, ReadEngine};
use crate::{Mode, Slots};

/// Bytes nobody wants are read into this much memory, over and over.
const DISCARD_BYTES: usize = 256 << 10;
/// Bounce buffer of one read.
const BOUNCE_BYTES: usize = 64 << 10;
/// Most bytes of one read; the kernel's own limit is a little under 2 GiB.
const READ_BYTES_MAX: u64 = 1 << 30;
/// How often a read is repeated after an I/O error.
const RETRIES_MAX: u32 = 3;
/// Interruptions tolerated in a row by one request.
const INTERRUPTIONS_MAX: u32 = 1000;
/// How long a dropped engine waits for reads that do not finish before it gives their memory up.
const DROP_PATIENCE: Duration = Duration::from_secs(5);
const NONE: u32 = u32::MAX;

struct PieceNode {
    piece: Piece,
    next: u32,
}

struct Request {
    tag: u64,
    offset: u64,
    length: u64,
    done: u64,
    first_piece: u32,
    /// The piece that byte `done` belongs to, and how far into it that is.
    piece: u32,
    within: u32,
    /// All pieces but the last are aligned, and so is the offset.
    aligned: bool,
    retries: u32,
    interruptions: u32,
    next_waiting: u32,
}

/// A read at the transport.
struct Flight {
    request: u32,
    started: Instant,
    length: u32,
    /// Bytes in front of the wanted ones, where the read went through the bounce buffer.
    bounced: Option<u32>,
}

pub(crate) struct QueuedEngine {
    transport: Box<dyn Transport>,
    file: Arc<DirectFile>,
    slots: Slots,
    description: String,
    deadline: Duration,
    retries_max: u32,
    iovecs_max: usize,
    discard: Arc<AlignedMemory>,
    bounce: Option<Arc<AlignedMemory>>,
    bounce_bytes: usize,
    iovecs: Vec<IoVec>,
    flights: Vec<Option<Flight>>,
    flights_free: Vec<u32>,
    requests: Vec<Request>,
    requests_free: Vec<u32>,
    pieces: Vec<PieceNode>,
    pieces_free: u32,
    first_waiting: u32,
    last_waiting: u32,
    in_flight: usize,
    finished: Vec<Finished>,
    counters: Counters,
}

// SAFETY: the raw pointers in `iovecs` point into memory owned by this value; nothing is tied to a thread.
unsafe impl Send for QueuedEngine {}

impl QueuedEngine {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        note: String,
        file: Arc<DirectFile>,
        slots: Slots,
        depth: usize,
        deadline: Duration,
        pieces_per_read_max: usize,
    ) -> Result<Self, IoError> {
        let alignment = file.alignment();
        let unit = alignment.memory.max(alignment.length);
        if !slots.stride().is_multiple_of(unit) {
            return Err(IoError::SlotAlignment { stride: slots.stride(), needed: unit });
        }
        let depth = depth.max(1);
        let iovecs_max = pieces_per_read_max.clamp(1, 1024);
        let mut description = transport.describe();
        description.push_str(&format!(", {} reads in flight, {} I/O", depth, file.mode()));
        if file.mode() == Mode::Buffered {
            description.push_str(&format!(" ({})", file.reason()));
        }
        if !note.is_empty() {
            description.push_str(&format!("; {note}"));
        }
        // A gap before each slot, at most.
        let piece_room = 2 * slots.count().min(1 << 16) + depth;
        let request_room = slots.count().min(1 << 16);
        Ok(Self {
            transport,
            slots,
            description,
            deadline,
            retries_max: RETRIES_MAX,
            iovecs_max,
            discard: Arc::new(AlignedMemory::new(DISCARD_BYTES)?),
            bounce: None,
            bounce_bytes: BOUNCE_BYTES.max(2 * alignment.file_unit() as usize),
            iovecs: vec![IoVec { base: ptr::null_mut(), bytes: 0 }; depth * iovecs_max],
            flights: (0..depth).map(|_| None).collect(),
            flights_free: (0..depth as u32).rev().collect(),
            requests: Vec::with_capacity(request_room),
            requests_free: Vec::with_capacity(request_room),
            pieces: Vec::with_capacity(piece_room),
            pieces_free: NONE,
            first_waiting: NONE,
            last_waiting: NONE,
            in_flight: 0,
            finished: Vec::with_capacity(depth),
            counters: Counters::default(),
            file,
        })
    }

    /// Checks a batch, claiming its slots. On an error the claims made so far stay and the caller takes them back.
    fn check(&mut self, batch: &ReadBatch) -> Result<(), IoError> {
        for (tag, offset, pieces) in batch.requests() {
            let mut length = 0u64;
            let mut wanted = false;
            for piece in pieces {
                length += u64::from(piece.bytes());
                if let Piece::Slot { slot, bytes } = *piece {
                    self.slots.claim(slot, bytes)?;
                    wanted = true;
                }
            }
            if !wanted {
                return Err(IoError::EmptyRequest { tag });
            }
            if offset.checked_add(length).is_none_or(|end| end > self.file.len()) {
                let path = self.file.path().to_path_buf();
                return Err(IoError::BeyondEnd { path, offset, length, file_length: self.file.len() });
            }
        }
        Ok(())
    }

    /// Queues a checked request.
    fn enqueue(&mut self, tag: u64, offset: u64, pieces: &[Piece]) {
        let unit = self.file.alignment().file_unit();
        let mut aligned = offset.is_multiple_of(unit);
        let mut length = 0;
        let mut first = NONE;
        for (index, &piece) in pieces.iter().enumerate().rev() {
            if let Piece::Slot { slot, .. } = piece {
                self.slots.begin_read(slot);
            }
            length += u64::from(piece.bytes());
            aligned &= index + 1 == pieces.len() || u64::from(piece.bytes()) % unit == 0;
            first = self.new_piece(PieceNode { piece, next: first });
        }
        let request = Request {
            tag,
            offset,
            length,
            done: 0,
            first_piece: first,
            piece: first,
            within: 0,
            aligned,
            retries: 0,
            interruptions: 0,
            next_waiting: NONE,
        };
        let id = match self.requests_free.pop() {
            Some(id) => {
                self.requests[id as usize] = request;
                id
            }
            None => {
                self.requests.push(request);
                self.requests.len() as u32 - 1
            }
        };
        if self.last_waiting == NONE {
            self.first_waiting = id;
        } else {
            self.requests[self.last_waiting as usize].next_waiting = id;
        }
        self.last_waiting = id;
        self.in_flight += 1;
    }

    fn new_piece(&mut self, node: PieceNode) -> u32 {
        match self.pieces_free {
            NONE => {
                self.pieces.push(node);
                self.pieces.len() as u32 - 1
            }
            id => {
                self.pieces_free = self.pieces[id as usize].next;
                self.pieces[id as usize] = node;
                id
            }
        }
    }

    /// Starts waiting requests while there is room.
    fn pump(&mut self) -> Result<(), IoError> {
        while self.first_waiting != NONE {
            let Some(flight) = self.flights_free.pop() else { break };
            let request = self.first_waiting;
            self.first_waiting = self.requests[request as usize].next_waiting;
            if self.first_waiting == NONE {
                self.last_waiting = NONE;
            }
            self.start(flight, request, Instant::now())?;
        }
        Ok(())
    }

    /// Sends the next read of a request to the transport.
    fn start(&mut self, flight: u32, request_id: u32, started: Instant) -> Result<(), IoError> {
        let operation = self.next_read(flight, request_id, started)?;
        // SAFETY: the stretches lie in the slots (marked in flight), the discard memory or this flight's bounce
        // buffer. All are owned by `self`, whose drop waits for open operations or leaks the memory; the array is
        // this flight's own and never resized. Slots in flight, discard and bounce bytes are looked at by nobody.
        unsafe { self.transport.start(operation) };
        Ok(())
    }

    /// Makes the next read of a request in this thread. A disk that hangs is waited for without a deadline.
    fn read_here(
        &mut self,
        flight: u32,
        request_id: u32,
        started: Instant,
        done: &mut Vec<Completion>,
    ) -> Result<(), IoError> {
        let operation = self.next_read(flight, request_id, started)?;
        // SAFETY: as in `start`, and the read is over when this returns.
        let result = unsafe { read_now(&self.file, operation) };
        self.end_read(Finished { id: flight, result }, done)
    }

    /// The next read of a request, on record as this flight's.
    fn next_read(&mut self, flight: u32, request_id: u32, started: Instant) -> Result<Operation, IoError> {
        let unit = self.file.alignment().file_unit();
        let request = &self.requests[request_id as usize];
        let position = request.offset + request.done;
        let remaining = request.length - request.done;
        let iovecs_start = flight as usize * self.iovecs_max;
        let (offset, length, count, bounced) = if !request.aligned || !position.is_multiple_of(unit) || remaining < unit
        {
            let lead = position % unit;
            let wanted = remaining.min(self.bounce_bytes as u64 - lead);
            let length = (lead + wanted).next_multiple_of(unit);
            self.iovecs[iovecs_start] = IoVec { base: self.bounce_ptr(flight)?, bytes: length as usize };
            self.counters.bounced += 1;
            (position - lead, length, 1, Some(lead as u32))
        } else {
            let (length, count) = self.gather(iovecs_start, request_id, remaining / unit * unit);
            (position, length, count, None)
        };
        self.flights[flight as usize] = Some(Flight { request: request_id, started, length: length as u32, bounced });
        self.counters.reads += 1;
        Ok(Operation { id: flight, offset, iovecs: self.iovecs[iovecs_start..].as_ptr(), count })
    }

    /// Lists where the next bytes of an aligned request go, at most `limit` of them; merges touching stretches.
    fn gather(&mut self, iovecs_start: usize, request_id: u32, limit: u64) -> (u64, u32) {
        let request = &self.requests[request_id as usize];
        let limit = limit.min(READ_BYTES_MAX);
        let (mut node, mut within) = (request.piece, request.within);
        let (mut total, mut count) = (0u64, 0usize);
        while total < limit && node != NONE {
            let piece = self.pieces[node as usize].piece;
            let left = u64::from(piece.bytes() - within).min(limit - total);
            let (base, bytes) = match piece {
                Piece::Slot { slot, .. } => {
                    // SAFETY: `within` is less than the piece, which fits its slot (checked on submit).
                    (unsafe { self.slots.slot_ptr(slot).add(within as usize) }, left as usize)
                }
                Piece::Gap { .. } => (self.discard.as_ptr(), left.min(DISCARD_BYTES as u64) as usize),
            };
            let last = count.checked_sub(1).map(|last| &mut self.iovecs[iovecs_start + last]);
            match last {
                Some(last) if matches!(piece, Piece::Slot { .. }) && last.base.wrapping_add(last.bytes) == base => {
                    last.bytes += bytes;
                }
                _ if count == self.iovecs_max => break,
                _ => {
                    self.iovecs[iovecs_start + count] = IoVec { base, bytes };
                    count += 1;
                }
            }
            total += bytes as u64;
            within += bytes as u32;
            if within == piece.bytes() {
                node = self.pieces[node as usize].next;
                within = 0;
            }
        }
        (total, count as u32)
    }

    /// The bounce buffer of a flight; mapped when the first unaligned read comes.
    fn bounce_ptr(&mut self, flight: u32) -> Result<*mut u8, IoError> {
        let stride = self.bounce_bytes + self.file.alignment().file_unit() as usize;
        if self.bounce.is_none() {
            self.bounce = Some(Arc::new(AlignedMemory::new(stride * self.flights.len())?));
        }
        let base = self.bounce.as_ref().map_or(ptr::null_mut(), |memory| memory.as_ptr());
        // SAFETY: the memory holds one stride for each flight.
        Ok(unsafe { base.add(flight as usize * stride) })
    }

    /// Handles the end of a read: continues, repeats or completes its request.
    fn end_read(&mut self, finished: Finished, done: &mut Vec<Completion>) -> Result<(), IoError> {
        let Some(flight) = self.flights.get_mut(finished.id as usize).and_then(Option::take) else { return Ok(()) };
        if finished.result < 0 {
            return self.end_failed_read(finished.id, &flight, -finished.result, done);
        }
        let read = u64::from(finished.result as u32).min(u64::from(flight.length));
        self.counters.bytes += read;
        if self.file.mode() == Mode::Buffered {
            let request = &self.requests[flight.request as usize];
            self.file.forget(request.offset + request.done, read);
        }
        let request = &self.requests[flight.request as usize];
        let remaining = request.length - request.done;
        let useful = read.saturating_sub(u64::from(flight.bounced.unwrap_or(0))).min(remaining);
        if useful == 0 {
            let error = IoError::UnexpectedEnd {
                path: self.file.path().to_path_buf(),
                offset: request.offset,
                expected: request.length,
                found: request.done,
                length_at_open: self.file.len(),
                length_now: self.file.length_now(),
            };
            self.complete(finished.id, flight.request, Err(error), done);
            return Ok(());
        }
        let source = match flight.bounced {
            // SAFETY: `lead` is less than the bounce buffer.
            Some(lead) => Some(unsafe { self.bounce_ptr(finished.id)?.add(lead as usize) }),
            None => None,
        };
        self.advance(flight.request, useful, source.map(<*mut u8>::cast_const));
        let request = &mut self.requests[flight.request as usize];
        request.interruptions = 0;
        if request.done == request.length {
            self.complete(finished.id, flight.request, Ok(()), done);
            Ok(())
        } else {
            self.start(finished.id, flight.request, Instant::now())
        }
    }

    fn end_failed_read(
        &mut self,
        flight_id: u32,
        flight: &Flight,
        errno: i32,
        done: &mut Vec<Completion>,
    ) -> Result<(), IoError> {
        let request = &mut self.requests[flight.request as usize];
        let repeat = match Errno::from_raw_os_error(errno) {
            // Nobody here cancels reads before the engine is dropped. The kernel does where it can start no thread for a
            // read that io_uring cannot make at once (of a file just written, or through the page cache), and it would
            // do so again; and where the thread that started the read has ended.
            Errno::CANCELED => {
                self.counters.retries += 1;
                return self.read_here(flight_id, flight.request, flight.started, done);
            }
            Errno::INTR | Errno::AGAIN => {
                request.interruptions += 1;
                request.interruptions <= INTERRUPTIONS_MAX
            }
            Errno::IO => {
                request.retries += 1;
                request.retries <= self.retries_max
            }
            _ => false,
        };
        if repeat {
            self.counters.retries += 1;
            return self.start(flight_id, flight.request, flight.started);
        }
        let error = IoError::Read {
            path: self.file.path().to_path_buf(),
            offset: request.offset + request.done,
            length: request.length - request.done,
            retries: request.retries.min(self.retries_max),
            source: io::Error::from_raw_os_error(errno),
        };
        self.complete(flight_id, flight.request, Err(error), done);
        Ok(())
    }

    /// Moves a request on by `bytes`, copying them from `source` to the slots where the read was bounced.
    fn advance(&mut self, request_id: u32, bytes: u64, source: Option<*const u8>) {
        let request = &mut self.requests[request_id as usize];
        let mut left = bytes;
        while left > 0 && request.piece != NONE {
            let node = &self.pieces[request.piece as usize];
            let step = u64::from(node.piece.bytes() - request.within).min(left);
            if let (Some(source), Piece::Slot { slot, .. }) = (source, node.piece) {
                // SAFETY: `bytes` were read to `source`, of which `bytes - left` are used; the piece fits its slot,
                // which is in flight and so ours to write; bounce buffer and slots are different mappings.
                unsafe {
                    let target = self.slots.slot_ptr(slot).add(request.within as usize);
                    ptr::copy_nonoverlapping(source.add((bytes - left) as usize), target, step as usize);
                }
            }
            request.within += step as u32;
            left -= step;
            if request.within == node.piece.bytes() {
                request.piece = node.next;
                request.within = 0;
            }
        }
        request.done += bytes;
    }

    /// Ends a request: its slots, its pieces, its flight.
    fn complete(&mut self, flight: u32, request_id: u32, result: Result<(), IoError>, done: &mut Vec<Completion>) {
        let request = &self.requests[request_id as usize];
        let mut node = request.first_piece;
        while node != NONE {
            let next = self.pieces[node as usize].next;
            if let Piece::Slot { slot, bytes } = self.pieces[node as usize].piece {
                self.slots.complete_read(slot, result.is_ok().then_some(bytes));
            }
            self.pieces[node as usize].next = self.pieces_free;
            self.pieces_free = node;
            node = next;
        }
        done.push(Completion { tag: request.tag, bytes: request.length, result });
        self.requests_free.push(request_id);
        self.flights_free.push(flight);
        self.in_flight -= 1;
    }

    /// The read that has been under way longest: its age and request.
    fn oldest(&self) -> Option<(Duration, u32)> {
        let oldest = self.flights.iter().flatten().min_by_key(|flight| flight.started)?;
        Some((oldest.started.elapsed(), oldest.request))
    }

    fn open_reads(&self) -> usize {
        self.flights.len() - self.flights_free.len()
    }

    fn broken(&self, operation: &'static str) -> impl FnOnce(io::Error) -> IoError + use<> {
        let engine = self.transport.name();
        move |source| IoError::Engine { engine, operation, source }
    }

    /// One round of reaping: at most until the oldest read's deadline.
    fn reap(&mut self, at_least: usize, done: &mut Vec<Completion>) -> Result<(), IoError> {
        let at_least = at_least.min(self.open_reads());
        let age = if at_least == 0 { Duration::ZERO } else { self.oldest().map_or(Duration::ZERO, |(age, _)| age) };
        // A read that came back while nobody looked is not stalled: look for a moment even after the deadline.
        let patience = self.deadline.saturating_sub(age).max(Duration::from_millis(20));
        let mut finished = std::mem::take(&mut self.finished);
        finished.clear();
        let outcome = self.transport.reap(at_least, patience, &mut finished);
        let mut ended = Ok(());
        for &one in &finished {
            ended = ended.and(self.end_read(one, done));
        }
        let nothing = finished.is_empty();
        self.finished = finished;
        outcome.map_err(self.broken("wait"))?;
        ended?;
        if nothing
            && at_least > 0
            && let Some((age, request)) = self.oldest()
            && age >= self.deadline
        {
            let request = &self.requests[request as usize];
            return Err(IoError::Stalled {
                path: self.file.path().to_path_buf(),
                offset: request.offset,
                length: request.length,
                waited_s: age.as_secs_f64(),
            });
        }
        Ok(())
    }

    fn wait_inner(&mut self, at_least: usize, done: &mut Vec<Completion>) -> Result<(), IoError> {
        let goal = done.len() + at_least.min(self.in_flight);
        loop {
            self.reap(goal.saturating_sub(done.len()), done)?;
            self.pump()?;
            if done.len() >= goal {
                return self.transport.flush().map_err(self.broken("submit"));
            }
        }
    }
}

impl ReadEngine for QueuedEngine {
    fn slots(&self) -> &Slots {
        &self.slots
    }

    fn slots_mut(&mut self) -> &mut Slots {
        &mut self.slots
    }

    fn submit(&mut self, batch: &ReadBatch) -> Result<(), IoError> {
        if let Err(error) = self.check(batch) {
            for (_, _, pieces) in batch.requests() {
                for piece in pieces {
                    if let Piece::Slot { slot, .. } = *piece {
                        self.slots.unclaim(slot);
                    }
                }
            }
            return Err(error);
        }
        for (tag, offset, pieces) in batch.requests() {
            self.enqueue(tag, offset, pieces);
        }
        self.pump()?;
        self.transport.flush().map_err(self.broken("submit"))
    }

    fn wait(&mut self, at_least: usize, done: &mut Vec<Completion>) -> Result<usize, IoError> {
        if self.in_flight == 0 {
            return Ok(0);
        }
        let before = done.len();
        let start = Instant::now();
        let outcome = self.wait_inner(at_least, done);
        self.counters.wait_ns += start.elapsed().as_nanos() as u64;
        outcome.map(|()| done.len() - before)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn name(&self) -> &'static str {
        self.transport.name()
    }

    fn description(&self) -> &str {
        &self.description
    }
}

impl Drop for QueuedEngine {
    fn drop(&mut self) {
        let mut open = self.flights.iter().flatten().count();
        if open > 0 {
            self.transport.cancel();
        }
        let start = Instant::now();
        while open > 0 && start.elapsed() < DROP_PATIENCE {
            self.finished.clear();
            if self.transport.reap(1, Duration::from_millis(200), &mut self.finished).is_err() {
                break;
            }
            open = open.saturating_sub(self.finished.len());
        }
        if open > 0 {
            // A hung disk may still write into these. Losing them is the only safe thing left.
            std::mem::forget(Arc::clone(self.slots.memory()));
            std::mem::forget(Arc::clone(&self.discard));
            std::mem::forget(self.bounce.clone());
            std::mem::forget(std::mem::take(&mut self.iovecs));
        }
    }
}
