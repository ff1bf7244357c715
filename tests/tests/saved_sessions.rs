//! Sessions in files: the text is what it is without, for less; and no file is believed.

use std::fs;
use std::path::Path;

use flashlm::engine::PIECE_TOKENS;
use flashlm::{Error, KvDtype, Model, Sampling, Session};
use flashlm_formats::bundle::LayoutOptions;
use flashlm_formats::destination::{Destination, FileKind};
use flashlm_formats::sessions::SessionReader;
use flashlm_tests::{bundle_with_predictors, run, scratch, tiny_opt};

const CONTEXT: usize = 400;

fn open(path: &Path) -> Model {
    Model::open(path).unwrap().context(CONTEXT).load().unwrap()
}

fn ids(count: usize, which: usize) -> Vec<u32> {
    (0..count).map(|i| (5 + (i * 97 + which * 31) % 4000) as u32).collect()
}

fn session(model: &Model) -> Session<'_> {
    let sampling = Sampling { temperature: 0.8, repetition_penalty: 1.1, seed: 4, ..Sampling::default() };
    model.session().unwrap().sampling(sampling).max_tokens(20).ignore_eos()
}

fn said(session: &mut Session<'_>, ids: &[u32]) -> Vec<u32> {
    session.generate_from(ids).unwrap().filter_map(|token| token.unwrap().id).collect()
}

fn save(session: &mut Session<'_>, path: &Path) -> u64 {
    session.save(Destination::take(path, FileKind::Session, &[]).unwrap()).unwrap()
}

fn bundle(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("model.flashlm");
    bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    path
}

#[test]
fn a_prompt_that_begins_alike_gives_its_text_for_less() {
    let dir = scratch();
    let bundle = bundle(dir.path());
    let path = dir.path().join("session.kv");
    for kv in [KvDtype::F16, KvDtype::Int8] {
        let model = Model::open(&bundle).unwrap().context(CONTEXT).kv(kv).load().unwrap();
        for (first, second, at_least) in [
            // Shorter than a piece, longer than one, at its end, with a rest that is computed token by token.
            (100, 140, 84),
            (100, 101, 84),
            (100, 90, 70),
            (10, 14, 10),
            (10, 30, 0),
            (PIECE_TOKENS + 5, PIECE_TOKENS + 9, PIECE_TOKENS + 5),
            (PIECE_TOKENS + 5, PIECE_TOKENS + 60, PIECE_TOKENS),
            (PIECE_TOKENS + 40, PIECE_TOKENS + 90, PIECE_TOKENS + 24),
            (PIECE_TOKENS - 4, PIECE_TOKENS + 3, PIECE_TOKENS - 20),
            (PIECE_TOKENS, PIECE_TOKENS + 1, PIECE_TOKENS),
        ] {
            let (short, long) = (ids(first, 1), ids(second, 1));
            let mut saving = session(&model);
            said(&mut saving, &short);
            let bytes = save(&mut saving, &path);
            drop(saving);
            let heads = model.spec().attention().kv_heads as u64;
            let row = if kv == KvDtype::F16 { 256 * 2 } else { 256 + heads * 2 };
            assert_eq!(bytes, (first + 19) as u64 * 8 * 2 * row, "keys and values in {kv:?}");

            let mut cold = session(&model);
            let expected = said(&mut cold, &long);
            let next = said(&mut cold, &ids(30, 2));
            drop(cold);
            let mut warm = session(&model);
            let had = warm.resume(&path, &long).unwrap();
            assert!(had >= at_least && had < second, "{had} of {second} after {first}");
            assert_eq!(said(&mut warm, &long[had..]), expected, "{had} of {second} after {first}");
            assert_eq!(said(&mut warm, &ids(30, 2)), next, "the turn after it");
            // What it computed with the file is what is computed without.
            save(&mut warm, &path);
            let saved = fs::read(&path).unwrap();
            drop(warm);
            let mut cold = session(&model);
            said(&mut cold, &long);
            said(&mut cold, &ids(30, 2));
            save(&mut cold, &path);
            assert!(fs::read(&path).unwrap() == saved, "{had} of {second} after {first}");
        }
    }
}

#[test]
fn what_was_answered_is_computed_as_a_prompt_and_then_kept() {
    let dir = scratch();
    let model = open(&bundle(dir.path()));
    let path = dir.path().join("session.kv");
    let mut first = session(&model);
    let mut text = ids(60, 1);
    text.extend(said(&mut first, &text));
    save(&mut first, &path);
    drop(first);
    text.extend(ids(25, 3));
    let mut second = session(&model);
    // The answer was decoded: in a prompt it is computed in products, to other bits.
    let had = second.resume(&path, &text).unwrap();
    assert_eq!(had, 60);
    let answer = said(&mut second, &text[had..]);
    save(&mut second, &path);
    drop(second);
    let mut cold = session(&model);
    assert_eq!(said(&mut cold, &text), answer);
    drop(cold);
    let mut third = session(&model);
    assert_eq!(third.resume(&path, &[&text[..], &ids(40, 5)].concat()).unwrap(), text.len());
    assert_eq!(third.resume(&path, &ids(40, 7)).unwrap(), 0, "another text");
    assert!(third.is_empty());
}

#[test]
fn a_conversation_goes_on_where_it_ended() {
    let dir = scratch();
    let model = open(&bundle(dir.path()));
    let path = dir.path().join("session.kv");
    let mut whole = session(&model);
    let turns = [ids(40, 1), ids(7, 2), ids(30, 3)];
    let expected: Vec<_> = turns.iter().map(|ids| said(&mut whole, ids)).collect();
    drop(whole);
    for ended in 0..turns.len() {
        let mut before = session(&model);
        let found: Vec<_> = turns[..ended].iter().map(|ids| said(&mut before, ids)).collect();
        assert_eq!(found, expected[..ended]);
        save(&mut before, &path);
        drop(before);
        let mut after = session(&model);
        let had = after.restore(&path).unwrap();
        assert_eq!(had, turns[..ended].iter().map(Vec::len).sum::<usize>() + 20 * ended);
        assert_eq!(after.len(), had);
    }
    // The random numbers are those of a new run; without drawing, the texts are the same.
    let plain = || model.session().unwrap().max_tokens(15).ignore_eos();
    let mut whole = plain();
    let expected: Vec<_> = turns.iter().map(|ids| said(&mut whole, ids)).collect();
    drop(whole);
    for ended in 1..turns.len() {
        let mut before = plain();
        turns[..ended].iter().for_each(|ids| _ = said(&mut before, ids));
        save(&mut before, &path);
        drop(before);
        let mut after = plain();
        after.restore(&path).unwrap();
        let rest: Vec<_> = turns[ended..].iter().map(|ids| said(&mut after, ids)).collect();
        assert_eq!(rest, expected[ended..], "{ended}");
    }
}

#[test]
fn a_file_of_another_kind_is_refused_and_left_alone() {
    let dir = scratch();
    let bundle = bundle(dir.path());
    let path = dir.path().join("session.kv");
    let model = open(&bundle);
    let mut saving = session(&model);
    said(&mut saving, &ids(30, 1));
    save(&mut saving, &path);
    drop(saving);
    let good = fs::read(&path).unwrap();
    let tokens = SessionReader::open(&path).unwrap().session().ids.len();
    assert_eq!(tokens, 50);

    // Damaged anywhere, nothing of it is used.
    let mut warm = session(&model);
    for at in (0..good.len()).step_by(good.len() / 40) {
        let mut damaged = good.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(matches!(warm.resume(&path, &ids(40, 1)), Err(Error::SavedSession(_) | Error::OtherSession { .. })));
        assert!(warm.is_empty());
    }
    let cold = said(&mut warm, &ids(40, 1));
    drop(warm);
    fs::write(&path, &good).unwrap();
    drop(model);

    let [bundle, session] = [&bundle, &path].map(|path| path.to_str().unwrap());
    let prompt: String = ids(40, 1).iter().map(|id| format!("{id},")).collect();
    let prompt = prompt.trim_end_matches(',');
    let base = ["run", bundle, "--ids", prompt, "-n", "20", "--session", session, "--json", "--ignore-eos"];
    let command = |more: &[&str]| run("flashlm", &[&base, more].concat(), "");
    command(&["--kv", "f32"]).failed(1, &["--kv f16", "--kv f32", "give another --session"]);
    command(&["--kv", "int8"]).failed(1, &["--kv f16", "--kv int8", "give another --session"]);
    command(&["--exact"]).failed(1, &["predicted neurons", "every neuron"]);
    let other = dir.path().join("other.flashlm");
    flashlm_tests::pack_checkpoint(&tiny_opt(), &other);
    let args = ["run", other.to_str().unwrap(), "--prompt", "a", "--session", session];
    run("flashlm", &args, "").failed(1, &["another bundle"]);
    assert!(fs::read(&path).unwrap() == good, "it was left alone");
    let args = ["run", bundle, "--prompt", "a", "--session", bundle];
    run("flashlm", &args, "").failed(1, &["this command reads"]);
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let notes = dir.path().join("notes.txt");
    let args = ["run", bundle, "--prompt", "a", "--session", notes.to_str().unwrap()];
    run("flashlm", &args, "").failed(1, &["is not a saved session, so it is left alone"]);

    let sampling = ["--temperature", "0.8", "--repetition-penalty", "1.1", "--seed", "4"];
    let told = command(&sampling).succeeded();
    let last: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!(last["resumed_tokens"], 24);
    let found: Vec<u64> = told
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_u64())
        .collect();
    assert_eq!(found, cold.iter().map(|id| u64::from(*id)).collect::<Vec<_>>());
    assert_eq!(SessionReader::open(&path).unwrap().session().ids.len(), 60);
    assert!(!dir.path().join("session.kv.partial").exists());
}
