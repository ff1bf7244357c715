//! Measures a disk as flashlm reads it: sequential rate, random rates of both engines, and reads at
//! 512-byte against 4 KiB alignment. Prints Markdown.
//!
//!     cargo bench -p flashlm-io --bench disk_figures -- FOLDER [BYTES [SECONDS_PER_FIGURE [ROUNDS]]]

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flashlm_io::{
    AlignedMemory, Alignment, DirectFile, DirectIo, EngineChoice, Engines, RandomPattern, ScratchFile, Slots,
    StreamOptions, device_key, random_read_rate, sequential_read_rate,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Something to measure: a name and what gives a rate. Rounds go over all of them, so that a busy disk hits all.
struct Figure<'a> {
    name: String,
    bytes: f64,
    rate: Box<dyn Fn(u64) -> Outcome<f64> + 'a>,
}

fn main() -> Outcome<()> {
    // Cargo adds a word of its own to what programs that measure are given.
    let arguments: Vec<String> = std::env::args().filter(|word| word != "--bench").collect();
    let folder = arguments.get(1).ok_or("give a folder on the disk to measure")?;
    let number = |index: usize, usual: f64| arguments.get(index).map_or(Ok(usual), |word| word.parse::<f64>());
    let (bytes, seconds, rounds) = (number(2, 4e9)? as u64, number(3, 0.1)?, number(4, 15.0)? as u64);
    let span = Duration::from_secs_f64(seconds);

    eprintln!("writing {bytes} bytes");
    let scratch = ScratchFile::create(Path::new(folder), bytes, &mut |_| {})?;
    let file = Arc::new(DirectFile::open(scratch.path(), DirectIo::Required)?);
    println!("Disk `{}`, file of {bytes} bytes, {:?}.", device_key(scratch.path()), file.alignment());
    println!("{rounds} rounds of {seconds} s each (sequential: three times that), alternating.\n");

    println!("## Sequential, GB/s\n");
    let stream = |engine: EngineChoice, chunk_bytes, chunks| {
        let file = &file;
        let name = format!("SequentialReader, {engine}, {chunks} x {} MiB", chunk_bytes >> 20);
        let options = StreamOptions { chunk_bytes, chunks, engines: engine.into() };
        let rate = move |seed| Ok(sequential_read_rate(file, options, span * 3, seed)?);
        Figure { name, bytes: 1.0, rate: Box::new(rate) }
    };
    let plain = |mib: usize| {
        let file = &file;
        let rate = move |seed| plain_rate(file, mib << 20, span * 3, seed);
        Figure { name: format!("plain pread, {mib} MiB, one at a time"), bytes: 1.0, rate: Box::new(rate) }
    };
    let mut figures = vec![plain(4), plain(16), plain(64)];
    for (chunk, chunks) in [(1 << 20, 8), (2 << 20, 8), (4 << 20, 8), (2 << 20, 4)] {
        figures.push(stream(EngineChoice::IoUring, chunk, chunks));
    }
    figures.push(stream(EngineChoice::Threads, 2 << 20, 8));
    table(&figures, rounds, 1e9)?;

    println!("\n## Random reads at 4 KiB alignment, reads/s\n");
    let random = |choice, read_bytes: u32, step: u64, shift: u64, depth: usize| {
        let file = &file;
        let rate = move |seed| {
            let alignment = Alignment { memory: 4096, ..file.alignment() };
            let slots = Slots::new(depth, read_bytes as usize, alignment)?;
            let mut engine = Engines::from(choice).open(Arc::clone(file), slots, depth)?;
            Ok(random_read_rate(&mut *engine, file, RandomPattern { read_bytes, step, shift, seed }, span)?)
        };
        let name = format!(
            "{:.1} KiB every {:.1} KiB from {shift}, depth {depth}, {choice}",
            f64::from(read_bytes) / 1024.0,
            step as f64 / 1024.0
        );
        Figure { name, bytes: f64::from(read_bytes), rate: Box::new(rate) }
    };
    let mut figures = Vec::new();
    for kib in [8, 16, 32, 64] {
        figures.push(random(EngineChoice::IoUring, kib << 10, 4096, 0, 64));
        figures.push(random(EngineChoice::IoUring, kib << 10, 4096, 0, 128));
        figures.push(random(EngineChoice::Threads, kib << 10, 4096, 0, 64));
        figures.push(random(EngineChoice::Threads, kib << 10, 4096, 0, 128));
    }
    table(&figures, rounds, 1.0)?;

    println!("\n## 512-byte against 4 KiB alignment, io_uring, depth 128, reads/s\n");
    let uring = |read_bytes, step, shift| random(EngineChoice::IoUring, read_bytes, step, shift, 128);
    let mut figures = Vec::new();
    for (small, large) in [(1536, 4096), (3072, 4096), (6656, 8192), (12_800, 16_384)] {
        // What one record costs: packed at 512, or padded to 4 KiB.
        figures.push(uring(small, u64::from(small), 0));
        figures.push(uring(large, u64::from(large), 0));
    }
    for bytes in [4096, 16_384, 65_536] {
        // The same size beginning on a 4 KiB boundary and 512 bytes after one.
        figures.push(uring(bytes, 4096, 0));
        figures.push(uring(bytes, 4096, 512));
    }
    table(&figures, rounds, 1.0)
}

/// The plainest direct read there is: one large `pread` after another.
fn plain_rate(file: &DirectFile, block_bytes: usize, span: Duration, seed: u64) -> Outcome<f64> {
    let mut memory = AlignedMemory::new(block_bytes)?;
    // Faulted in beforehand, as the reader's buffers are after their first round.
    memory.as_mut_slice().fill(1);
    let blocks = file.len() / block_bytes as u64;
    let start = Instant::now();
    let mut bytes = 0;
    let mut block = seed * 7 % blocks;
    while start.elapsed() < span {
        bytes += rustix::io::pread(file, memory.as_mut_slice(), block * block_bytes as u64).map_err(io::Error::from)?;
        block = (block + 1) % blocks;
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Measures all figures in turn, `rounds` times, and prints them.
fn table(figures: &[Figure<'_>], rounds: u64, unit: f64) -> Outcome<()> {
    let mut rates = vec![Vec::new(); figures.len()];
    for round in 0..rounds {
        for (figure, rates) in figures.iter().zip(&mut rates) {
            rates.push((figure.rate)(round + 1)?);
        }
    }
    println!(
        "| what | median | upper decile | lowest - highest | MB/s, median | MB/s, upper decile |\n|---|---|---|---|---|---|"
    );
    for (figure, mut rates) in figures.iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let at = |share: f64| rates[((rates.len() - 1) as f64 * share).round() as usize];
        // Other users of the disk only ever slow a figure down: the upper decile is nearer to what the disk can do.
        let (low, median, upper, high) = (at(0.0), at(0.5), at(0.9), at(1.0));
        let digits = if unit > 1.0 { 3 } else { 0 };
        println!(
            "| {} | {:.digits$} | {:.digits$} | {:.digits$} - {:.digits$} | {:.0} | {:.0} |",
            figure.name,
            median / unit,
            upper / unit,
            low / unit,
            high / unit,
            median * figure.bytes / 1e6,
            upper * figure.bytes / 1e6
        );
    }
    Ok(())
}
