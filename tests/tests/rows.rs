//! A row's bits do not depend on its company: alone, with others of its sequence, of other sequences, beside pieces of prompts.

use flashlm::engine::{Executor, Row, SequenceId, Work};
use flashlm::error::RuntimeError;
use flashlm::forward::kv::KvDtype;
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_tests::{
    budgets, bundle_with_predictors, fixtures, options, pack_checkpoint, scratch, tiny_falcon, tiny_opt,
};

const CONTEXT: usize = 64;
const DECODED: usize = 31;

fn executor(bundle: &Bundle, options: &LoadOptions) -> Executor {
    let loaded = load(bundle, options, &mut |_, _| {}).unwrap_or_else(|e| panic!("{}: {e}", bundle.path().display()));
    loaded.forward.into_executor()
}

/// A prompt of sequence `which`, and the tokens that are decoded after it; every sequence has others.
fn tokens(which: usize, vocab: usize) -> (Vec<u32>, Vec<u32>) {
    let id = |i: usize| (5 + (i * 97 + which * 31) % (vocab - 8)) as u32;
    // As many tokens as no other one's, so that rows of a batch stand at different positions.
    let prompt = 4 + 3 * (which % 10);
    ((0..prompt).map(id).collect(), (prompt..prompt + DECODED).map(id).collect())
}

fn prompt_rows(sequence: SequenceId, ids: &[u32]) -> Vec<Row> {
    ids.iter().map(|&token| Row { sequence, token, work: Work::Prompt, wants_logits: false }).collect()
}

/// The logits of `rows`, by their place.
fn step(executor: &mut Executor, rows: &[Row]) -> Vec<Vec<u32>> {
    let mut found = vec![Vec::new(); rows.len()];
    let mut keep = |at: usize, logits: &mut [f32]| {
        found[at] = logits.iter().map(|logit| logit.to_bits()).collect();
        Ok(())
    };
    executor.step(rows, &mut keep).expect("the rows are good");
    found
}

/// What each sequence's rows have when they are computed one by one, `[sequence][row]`.
fn alone(bundle: &Bundle, options: &LoadOptions, sequences: usize) -> Vec<Vec<Vec<u32>>> {
    let mut executor = executor(bundle, options);
    let vocab = bundle.spec().vocab_size;
    let of = |which: usize| {
        let sequence = executor.open(CONTEXT).unwrap();
        let (prompt, decoded) = tokens(which, vocab);
        step(&mut executor, &prompt_rows(sequence, &prompt));
        let rows =
            decoded.iter().map(|token| step(&mut executor, &[Row::decode(sequence, *token)]).remove(0)).collect();
        executor.close(sequence);
        rows
    };
    (0..sequences).map(of).collect()
}

/// Rows of sequences in turn, `rows_of_each` of every one, and which row of which sequence each is.
fn batch(
    opened: &[(SequenceId, usize)],
    rows_of_each: usize,
    rows: usize,
    vocab: usize,
) -> (Vec<Row>, Vec<(usize, usize)>) {
    let mut next = vec![0; opened.len()];
    let mut all = Vec::new();
    for at in 0..rows {
        let place = at / rows_of_each % opened.len();
        let (sequence, which) = opened[place];
        all.push((Row::decode(sequence, tokens(which, vocab).1[next[place]]), (which, next[place])));
        next[place] += 1;
    }
    all.into_iter().unzip()
}

fn check_batches(bundle: &Bundle, options: &LoadOptions, expected: &[Vec<Vec<u32>>]) {
    let vocab = bundle.spec().vocab_size;
    let mut executor = executor(bundle, options);
    for rows in [2, 7, 16, 31] {
        for (sequences, rows_of_each) in [(1, 1), (3, 1), (3, 2), (rows, 1)] {
            let mut opened = Vec::new();
            for which in 0..sequences.min(expected.len()) {
                let sequence = executor.open(CONTEXT).unwrap();
                step(&mut executor, &prompt_rows(sequence, &tokens(which, vocab).0));
                opened.push((sequence, which));
            }
            let (mut batch, origin) = batch(&opened, rows_of_each, rows, vocab);
            // Among them a piece of somebody else's prompt.
            let guest = executor.open(CONTEXT).unwrap();
            let piece = prompt_rows(guest, &tokens(9, vocab).0);
            let middle = rows / 2;
            batch.splice(middle..middle, piece.iter().copied());
            let mut found = step(&mut executor, &batch);
            found.drain(middle..middle + piece.len());
            for (found, (which, row)) in found.iter().zip(origin) {
                assert!(*found == expected[which][row], "row {row} of {which} in {rows} of {sequences}: {options:?}");
            }
            opened.iter().for_each(|(sequence, _)| executor.close(*sequence));
            executor.close(guest);
        }
    }
}

fn ways(bundle: &Bundle) -> Vec<LoadOptions> {
    let base = |choice| LoadOptions { sequences: 12, batch: 16, ..options(CONTEXT, choice) };
    let (smallest, largest) = budgets(bundle, &base(FfnChoice::Flash));
    let budgets = [smallest, smallest + (largest - smallest) / 4, largest];
    let mut ways: Vec<LoadOptions> =
        budgets.map(|budget| LoadOptions { budget: Some(budget), ..base(FfnChoice::Flash) }).into();
    // Fewer at a time than there are rows.
    ways.push(LoadOptions { batch: 5, ..ways[1].clone() });
    ways.push(LoadOptions { batch: 31, look_ahead: false, budget: None, ..ways[1].clone() });
    ways.push(base(FfnChoice::Resident));
    ways.push(LoadOptions { batch: 1, ..base(FfnChoice::Streamed) });
    ways
}

#[test]
fn a_rows_bits_do_not_depend_on_its_company() {
    for (checkpoint, look_ahead) in [
        (tiny_opt(), true),
        (tiny_falcon(), false),
        (fixtures().join("quirks/llama-bamboo"), true),
        (fixtures().join("quirks/llama-biases-head-dim"), false),
    ] {
        let dir = scratch();
        let path = dir.path().join("model.flashlm");
        let bundle = bundle_with_predictors(&checkpoint, &path, LayoutOptions::default(), look_ahead);
        let expected = alone(&bundle, &options(CONTEXT, FfnChoice::Resident), 10);
        for way in ways(&bundle) {
            check_batches(&bundle, &way, &expected);
        }
    }
}

#[test]
fn without_predictors_every_neuron_is_computed_for_every_row() {
    let dir = scratch();
    let bundle = pack_checkpoint(&tiny_opt(), &dir.path().join("model.flashlm"));
    let expected = alone(&bundle, &options(CONTEXT, FfnChoice::Resident), 10);
    for choice in [FfnChoice::Resident, FfnChoice::Streamed, FfnChoice::Flash] {
        check_batches(&bundle, &LoadOptions { sequences: 12, batch: 16, ..options(CONTEXT, choice) }, &expected);
    }
}

#[test]
fn sequences_come_and_go_and_leave_no_trace() {
    let dir = scratch();
    let bundle = pack_checkpoint(&tiny_opt(), &dir.path().join("model.flashlm"));
    let vocab = bundle.spec().vocab_size;
    let options = LoadOptions { sequences: 3, ..options(CONTEXT, FfnChoice::Resident) };
    let expected = alone(&bundle, &options, 3);
    let mut executor = executor(&bundle, &options);
    // Two short ones leave gaps, so that the next one's places do not lie side by side.
    let short = [20, 40, 20].map(|context| executor.open(context).unwrap());
    executor.close(short[0]);
    executor.close(short[2]);
    let long = executor.open(CONTEXT).unwrap();
    let (prompt, decoded) = tokens(2, vocab);
    step(&mut executor, &prompt_rows(long, &prompt));
    for (token, expected) in decoded.iter().zip(&expected[2]) {
        assert!(step(&mut executor, &[Row::decode(long, *token)])[0] == *expected);
    }
    assert_eq!(executor.len(long), prompt.len() + DECODED);
    executor.truncate(long, prompt.len());
    assert!(step(&mut executor, &[Row::decode(long, decoded[0])])[0] == expected[2][0]);

    let nothing = &mut |_: usize, _: &mut [f32]| Ok(());
    let full = executor.open(CONTEXT).and_then(|_| executor.open(CONTEXT));
    assert!(matches!(full, Err(RuntimeError::NoRoomForSequence { .. })), "{full:?}");
    assert!(matches!(executor.open(CONTEXT + 1), Err(RuntimeError::ContextFull { wanted: 65, context: CONTEXT, .. })));
    assert!(matches!(executor.open(0), Err(RuntimeError::ContextOutOfRange { .. })));
    assert!(matches!(executor.step(&[], nothing), Err(RuntimeError::EmptyPrompt)));
    let closed = executor.step(&[Row::decode(short[0], 5)], nothing);
    assert!(matches!(closed, Err(RuntimeError::ClosedSequence)), "its place is another's: {closed:?}");
    let too_long = vec![Row::decode(short[1], 5); 41];
    assert!(matches!(
        executor.step(&too_long, nothing),
        Err(RuntimeError::ContextFull { wanted: 41, context: 40, .. })
    ));
    executor.close(short[1]);
    assert!(matches!(executor.step(&[Row::decode(short[1], 5)], nothing), Err(RuntimeError::ClosedSequence)));
    assert_eq!(executor.len(short[1]), 0);
}

/// Keys and values over several parts of the context, stored in every way, of sequences whose places do not lie side by side.
#[test]
fn long_contexts_have_the_same_bits_in_any_company() {
    let long = |which: usize| -> Vec<u32> {
        (0..150 + 67 * which).map(|i| (5 + (i * 97 + which * 31) % 4000) as u32).collect()
    };
    let decoded = |which: usize| -> Vec<u32> { (0..9).map(|i| (7 + i * 53 + which * 11) as u32).collect() };
    let context = 500;
    for checkpoint in [tiny_opt(), tiny_falcon(), fixtures().join("quirks/llama-biases-head-dim")] {
        let dir = scratch();
        let bundle = pack_checkpoint(&checkpoint, &dir.path().join("model.flashlm"));
        let (vocab, context) = (bundle.spec().vocab_size as u32, context.min(bundle.spec().max_positions));
        let fit =
            |ids: Vec<u32>, most: usize| -> Vec<u32> { ids.into_iter().take(most).map(|id| id % vocab).collect() };
        for kv in [KvDtype::F16, KvDtype::F32, KvDtype::Int8] {
            let mut expected: Vec<Vec<Vec<u32>>> = Vec::new();
            for (threads, together) in [(1, false), (2, true), (3, false), (3, true)] {
                let way = LoadOptions {
                    sequences: 3,
                    batch: 16,
                    kv: Some(kv),
                    threads: threads.try_into().unwrap(),
                    ..options(context, FfnChoice::Resident)
                };
                let mut executor = executor(&bundle, &way);
                // What is opened after this one is closed has places on both sides of others'.
                let short = executor.open(40).unwrap();
                let mut sequences = vec![executor.open(context - 80).unwrap()];
                executor.close(short);
                sequences.extend([executor.open(context).unwrap(), executor.open(context - 80).unwrap()]);
                for (which, sequence) in sequences.iter().enumerate() {
                    step(&mut executor, &prompt_rows(*sequence, &fit(long(which), context - 90)));
                }
                let rows: Vec<Vec<Row>> = (0..3)
                    .map(|which| fit(decoded(which), 9).iter().map(|id| Row::decode(sequences[which], *id)).collect())
                    .collect();
                let found = if together {
                    let all: Vec<Row> =
                        (0..9).flat_map(|at| (0..3).map(move |which| (which, at))).map(|(w, at)| rows[w][at]).collect();
                    let all = step(&mut executor, &all);
                    (0..3).map(|which| (0..9).map(|at| all[at * 3 + which].clone()).collect()).collect()
                } else {
                    rows.iter()
                        .map(|rows| rows.iter().map(|row| step(&mut executor, &[*row]).remove(0)).collect())
                        .collect()
                };
                if expected.is_empty() {
                    expected = found;
                } else {
                    assert!(
                        found == expected,
                        "{} {kv:?} {threads} threads, together: {together}",
                        checkpoint.display()
                    );
                }
            }
        }
    }
}
