//! One run over all engines, plain and with faults: whatever happens below, slots hold the file's bytes or an error.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flashlm_io::{
    Completion, DirectFile, DirectIo, EngineChoice, Engines, Extent, FaultPlan, IoError, Mode, ReadBatch, ReadEngine,
    SequentialReader, Slots, StreamOptions, read_extent_into,
};
use proptest::prelude::*;

const FILE_BYTES: usize = (3 << 20) + 777;

fn byte_at(offset: u64) -> u8 {
    let x = (offset / 8).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x.to_le_bytes()[(offset % 8) as usize] ^ (x >> 56) as u8
}

fn expected(offset: u64, bytes: usize) -> Vec<u8> {
    (offset..offset + bytes as u64).map(byte_at).collect()
}

/// A scratch file of known bytes on the filesystem of the build, which is a real disk more often than `/tmp`.
fn scratch() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all(&expected(0, FILE_BYTES)).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

/// Opens in every mode that the filesystem has. Direct I/O may be missing unless the environment requires it.
fn open_all(file: &tempfile::NamedTempFile) -> Vec<Arc<DirectFile>> {
    let mut files = vec![Arc::new(DirectFile::open(file.path(), DirectIo::Disabled).unwrap())];
    match DirectFile::open(file.path(), DirectIo::Required) {
        Ok(direct) => files.push(Arc::new(direct)),
        Err(error) if std::env::var_os("FLASHLM_REQUIRE_DIRECT").is_some_and(|v| v == "1") => panic!("{error}"),
        Err(error) => eprintln!("skipping direct I/O: {error}"),
    }
    files
}

fn engines() -> Vec<EngineChoice> {
    if cfg!(target_os = "linux") {
        vec![EngineChoice::IoUring, EngineChoice::Threads]
    } else {
        vec![EngineChoice::Threads]
    }
}

fn wait_all(engine: &mut dyn ReadEngine) -> Vec<Completion> {
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.wait(1, &mut done).unwrap();
    }
    done
}

#[test]
fn scattered_merged_and_gapped_reads_give_the_file() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            let slots = Slots::new(64, 8192, file.alignment()).unwrap();
            let mut engine = Engines::from(choice).open(Arc::clone(&file), slots, 4).unwrap();
            let mut batch = ReadBatch::new();
            for i in 0..20u64 {
                batch.read(i, i * 40_960, 63 - i as u32, 8192);
            }
            // Neighbours in file and arena, a gap larger than any buffer, then a neighbour elsewhere.
            batch.begin(20, 8192);
            for slot in 0..10 {
                batch.slot(slot, 8192);
            }
            batch.gap(1 << 20);
            batch.slot(20, 4096);
            // Unaligned, and up to the last byte.
            batch.read(21, 12_345, 30, 777);
            batch.read(22, (FILE_BYTES - 5000) as u64, 31, 5000);
            engine.submit(&batch).unwrap();
            let mut done = wait_all(&mut *engine);
            done.sort_by_key(|c| c.tag);
            assert_eq!(done.iter().map(|c| c.tag).collect::<Vec<_>>(), (0..23).collect::<Vec<_>>());
            for c in done {
                c.result.unwrap();
            }
            let slots = engine.slots();
            for i in 0..20u64 {
                assert_eq!(slots.slot(63 - i as u32).unwrap(), expected(i * 40_960, 8192), "{choice} {i}");
            }
            for slot in 0..10 {
                assert_eq!(slots.slot(slot).unwrap(), expected(8192 * (u64::from(slot) + 1), 8192), "{choice} {slot}");
            }
            assert_eq!(slots.slot(20).unwrap(), expected(8192 * 11 + (1 << 20), 4096));
            assert_eq!(slots.slot(30).unwrap(), expected(12_345, 777));
            assert_eq!(slots.slot(31).unwrap(), expected((FILE_BYTES - 5000) as u64, 5000));
            let counters = engine.counters();
            assert_eq!(counters.bounced > 0, file.mode() == Mode::Direct);
            assert!(counters.reads >= 23 && counters.reads < 30, "{counters:?}");
        }
    }
}

fn open_faulty(choice: EngineChoice, file: &Arc<DirectFile>, slots: Slots, plan: FaultPlan) -> Box<dyn ReadEngine> {
    let engines = Engines::from(choice).with_faults(plan).with_deadline(Duration::from_millis(300));
    engines.open(Arc::clone(file), slots, 8).unwrap()
}

/// 16 requests of two scattered slots with a gap between, one of them unaligned.
fn some_reads() -> ReadBatch {
    let mut batch = ReadBatch::new();
    for i in 0..16u32 {
        batch.begin(u64::from(i), offset_of(i));
        batch.slot(31 - 2 * i, 8192);
        batch.gap(4096);
        batch.slot(30 - 2 * i, 8192);
    }
    batch
}

fn offset_of(i: u32) -> u64 {
    u64::from(i) * 65_536 + if i == 5 { 333 } else { 0 }
}

fn check_some_reads(engine: &dyn ReadEngine, i: u32) {
    for (slot, offset) in [(31 - 2 * i, offset_of(i)), (30 - 2 * i, offset_of(i) + 12_288)] {
        assert!(engine.slots().slot(slot).unwrap() == expected(offset, 8192), "request {i}");
    }
}

#[test]
fn faults_that_pass_change_nothing_but_the_counters() {
    let plain = FaultPlan::default();
    let (interrupted, cancelled) = (rustix::io::Errno::INTR.raw_os_error(), rustix::io::Errno::CANCELED.raw_os_error());
    let plans = [
        ("plain", plain, 0),
        ("delaying", FaultPlan { delay: Duration::from_millis(5), ..plain }, 0),
        ("short every time", FaultPlan { short_every: 1, ..plain }, 0),
        ("short every third", FaultPlan { short_every: 3, ..plain }, 0),
        ("failing once", FaultPlan { fail_first: 1, ..plain }, 1),
        ("failing for a while", FaultPlan { fail_first: 8, ..plain }, 8),
        ("interrupted often", FaultPlan { fail_first: 200, errno: interrupted, ..plain }, 200),
        // As io_uring does it where the system lets no thread be started. Made here, none of them fails again.
        ("cancelled", FaultPlan { fail_first: u64::MAX, errno: cancelled, ..plain }, 2 * 16),
        ("all of it", FaultPlan { delay: Duration::from_millis(1), short_every: 2, fail_first: 3, ..plain }, 3),
    ];
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            for (name, plan, retries) in plans {
                let slots = Slots::new(32, 8192, file.alignment()).unwrap();
                let mut engine = open_faulty(choice, &file, slots, plan);
                for _ in 0..2 {
                    engine.submit(&some_reads()).unwrap();
                    for completion in wait_all(&mut *engine) {
                        completion.result.unwrap_or_else(|e| panic!("{choice} {name}: {e}"));
                    }
                    for i in 0..16 {
                        check_some_reads(&*engine, i);
                    }
                }
                let counters = engine.counters();
                assert_eq!(counters.retries, retries, "{choice} {name}");
                assert!(counters.bytes >= 2 * 16 * 20_480, "{choice} {name} {counters:?}");
                if plan.short_every > 0 {
                    assert!(counters.reads > 40, "{choice} {name} {counters:?}");
                }
            }
        }
    }
}

#[test]
fn lasting_faults_are_typed_and_leave_slots_empty() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            // 0 is EIO, tried four times; anything else is final at once.
            for (errno, retries) in [(0, 3), (rustix::io::Errno::NXIO.raw_os_error(), 0)] {
                let slots = Slots::new(32, 8192, file.alignment()).unwrap();
                let plan = FaultPlan { fail_first: u64::MAX, errno, ..FaultPlan::default() };
                let mut engine = open_faulty(choice, &file, slots, plan);
                engine.submit(&some_reads()).unwrap();
                let done = wait_all(&mut *engine);
                assert_eq!(done.len(), 16);
                for completion in done {
                    let at = offset_of(completion.tag as u32);
                    match completion.result.unwrap_err() {
                        IoError::Read { offset, length: 20_480, retries: r, source, .. } => {
                            assert_eq!((offset, r), (at, retries));
                            let expected = if errno == 0 { rustix::io::Errno::IO.raw_os_error() } else { errno };
                            assert_eq!(source.raw_os_error(), Some(expected));
                        }
                        other => panic!("{other}"),
                    }
                }
                assert!((0..32).all(|slot| engine.slots().slot(slot).is_none()));
            }
        }
    }
}

#[test]
fn a_stalled_read_ends_in_an_error_and_the_engine_can_still_be_dropped() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            let slots = Slots::new(32, 8192, file.alignment()).unwrap();
            let plan = FaultPlan { stall_first: 1, ..FaultPlan::default() };
            let mut engine = open_faulty(choice, &file, slots, plan);
            engine.submit(&some_reads()).unwrap();
            let (start, mut done) = (Instant::now(), Vec::new());
            let error = loop {
                match engine.wait(16, &mut done) {
                    Ok(_) => assert!(done.len() < 16),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, IoError::Stalled { offset: 0, length: 20_480, .. }), "{error}");
            assert!((0.25..3.0).contains(&start.elapsed().as_secs_f64()), "{choice} {:?}", start.elapsed());
            assert_eq!(done.len(), 15);
            assert_eq!(engine.slots().slot(31), None);
            for i in 1..16 {
                check_some_reads(&*engine, i);
            }
            let start = Instant::now();
            drop(engine);
            assert!(start.elapsed() < Duration::from_secs(2), "{choice} {:?}", start.elapsed());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any list of requests gives the file's bytes, aligned or not, whatever the depth and the faults.
    #[test]
    fn random_requests_give_the_files_bytes(
        requests in prop::collection::vec(
            (0u64..(FILE_BYTES as u64 - 400_000), any::<bool>(),
             prop::collection::vec((1u32..=6000, any::<bool>(), 0u32..50_000), 1..6)),
            1..12,
        ),
        depth in 1usize..20,
        pieces_per_read_max in 1usize..6,
        short_every in 0u64..4,
    ) {
        let scratch = shared_scratch();
        for file in open_all(scratch) {
            for choice in engines() {
                let slots = Slots::new(64, 6000, file.alignment()).unwrap();
                let faults = FaultPlan { short_every, ..FaultPlan::default() };
                let engines = Engines::from(choice).with_pieces_per_read_max(pieces_per_read_max).with_faults(faults);
                let mut engine = engines.open(Arc::clone(&file), slots, depth).unwrap();
                let (mut batch, mut wanted, mut slot) = (ReadBatch::new(), Vec::new(), 0);
                for (tag, (offset, aligned, pieces)) in requests.iter().enumerate() {
                    let (mask, mut at) = if *aligned { (!511, offset & !4095) } else { (!0, *offset) };
                    batch.begin(tag as u64, at);
                    for &(bytes, has_gap, gap) in pieces {
                        let bytes = (bytes & mask as u32).max(if *aligned { 512 } else { 1 });
                        // Down the arena or up, so that some neighbours merge and some do not.
                        let place = if tag % 2 == 0 { slot } else { slot ^ 1 };
                        batch.slot(place, bytes);
                        wanted.push((place, at, bytes));
                        at += u64::from(bytes);
                        slot += 1;
                        if has_gap {
                            batch.gap(gap & mask as u32);
                            at += u64::from(gap & mask as u32);
                        }
                    }
                    slot = slot.next_multiple_of(2);
                }
                engine.submit(&batch).unwrap();
                for completion in wait_all(&mut *engine) {
                    completion.result.unwrap();
                }
                for (slot, offset, bytes) in wanted {
                    prop_assert!(
                        engine.slots().slot(slot) == Some(&expected(offset, bytes as usize)[..]),
                        "{} slot {} at {} of {} bytes", choice, slot, offset, bytes
                    );
                }
            }
        }
    }
}

/// One file for all the cases of a property.
fn shared_scratch() -> &'static tempfile::NamedTempFile {
    static FILE: std::sync::OnceLock<tempfile::NamedTempFile> = std::sync::OnceLock::new();
    FILE.get_or_init(scratch)
}

#[test]
fn wrong_batches_are_refused_whole() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            let slots = Slots::new(4, 4096, file.alignment()).unwrap();
            let mut engine = Engines::from(choice).open(Arc::clone(&file), slots, 4).unwrap();
            let mut refuse = |build: &dyn Fn(&mut ReadBatch)| {
                let mut batch = ReadBatch::new();
                batch.read(0, 0, 0, 4096);
                build(&mut batch);
                let error = engine.submit(&batch).unwrap_err();
                assert_eq!(engine.in_flight(), 0);
                error
            };
            assert!(matches!(refuse(&|b| b.read(1, 0, 0, 4096)), IoError::SlotInFlight { slot: 0 }));
            assert!(matches!(refuse(&|b| b.read(1, 0, 4, 4096)), IoError::SlotOutOfRange { slot: 4, count: 4 }));
            assert!(matches!(refuse(&|b| b.read(1, 0, 1, 4097)), IoError::PieceLength { slot: 1, .. }));
            assert!(matches!(refuse(&|b| b.begin(9, 0)), IoError::EmptyRequest { tag: 9 }));
            assert!(matches!(refuse(&|b| b.read(1, FILE_BYTES as u64, 1, 1)), IoError::BeyondEnd { .. }));
            assert!(matches!(refuse(&|b| b.read(1, u64::MAX, 1, 1)), IoError::BeyondEnd { .. }));
            let mut batch = ReadBatch::new();
            batch.read(0, 0, 0, 4096);
            engine.submit(&batch).unwrap();
            assert!(matches!(engine.submit(&batch), Err(IoError::SlotInFlight { slot: 0 })));
            wait_all(&mut *engine);
            assert_eq!(engine.slots().slot(0).unwrap(), expected(0, 4096));
        }
    }
}

#[test]
fn engines_can_be_dropped_with_reads_in_flight() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            for _ in 0..20 {
                let slots = Slots::new(32, 65_536, file.alignment()).unwrap();
                let mut engine = Engines::from(choice).open(Arc::clone(&file), slots, 8).unwrap();
                let mut batch = ReadBatch::new();
                for i in 0..32 {
                    batch.read(i, i * 65_536, i as u32, 65_536);
                }
                engine.submit(&batch).unwrap();
            }
        }
    }
}

#[test]
fn a_file_that_shrinks_is_a_typed_error() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for choice in engines() {
            let slots = Slots::new(2, 65_536, file.alignment()).unwrap();
            let mut engine = Engines::from(choice).open(Arc::clone(&file), slots, 4).unwrap();
            scratch.as_file().set_len(1 << 20).unwrap();
            let mut batch = ReadBatch::new();
            batch.read(5, (1 << 20) - 4096, 0, 65_536);
            engine.submit(&batch).unwrap();
            let done = wait_all(&mut *engine);
            let error = done.into_iter().next().unwrap().result.unwrap_err();
            assert!(
                matches!(error, IoError::UnexpectedEnd { found: 4096, length_now: 1_048_576, .. }),
                "{choice} {error}"
            );
            assert_eq!(engine.slots().slot(0), None);
            scratch.as_file().set_len(FILE_BYTES as u64).unwrap();
        }
    }
}

#[test]
fn streams_give_extents_in_order_and_can_restart() {
    let scratch = scratch();
    for file in open_all(&scratch) {
        for engine in engines() {
            let options = StreamOptions { chunk_bytes: 65_536, chunks: 3, engines: engine.into() };
            let mut reader = SequentialReader::new(Arc::clone(&file), options).unwrap();
            assert!(reader.next().unwrap().is_none());
            let end = FILE_BYTES as u64;
            let lists: [&[(u64, u64)]; 4] = [
                &[(0, end)],
                &[(4096, 1 << 20), (0, 1), (5, 0), (777, 200_001), (end - 3, 3)],
                &[],
                &[(1 << 20, 1 << 20), (0, 1 << 20)],
            ];
            for list in lists {
                let extents: Vec<_> = list.iter().map(|&(offset, length)| Extent { offset, length }).collect();
                // Leave the list half-read once: restarting must not be confused by it.
                reader.restart(&extents).unwrap();
                reader.next().unwrap();
                reader.restart(&extents).unwrap();
                let mut bytes = vec![Vec::new(); list.len()];
                let mut last = 0;
                while let Some(chunk) = reader.next().unwrap() {
                    assert!(chunk.extent >= last);
                    last = chunk.extent;
                    assert_eq!(chunk.offset, list[last].0 + bytes[last].len() as u64);
                    bytes[last].extend_from_slice(chunk.bytes);
                }
                for (bytes, &(offset, length)) in bytes.iter().zip(list) {
                    assert!(*bytes == expected(offset, length as usize), "{engine} {offset} {length}");
                }
            }
            let beyond = [Extent { offset: end, length: 1 }];
            assert!(matches!(reader.restart(&beyond), Err(IoError::BeyondEnd { .. })));
        }
        for (offset, length) in [(0, 10), (777, 0), (4096, 500_000), (1, FILE_BYTES - 1)] {
            let mut out = vec![0; length];
            read_extent_into(&file, offset, &mut out).unwrap();
            assert!(out == expected(offset, length), "{offset} {length}");
        }
    }
}
