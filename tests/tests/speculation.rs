//! Guesses change what a text costs, never the text: whoever guesses, however much, with whatever sampling, wherever the text stops.

use std::fs;
use std::ops::ControlFlow;

use flashlm::engine::{Executor, Forward, SequenceId};
use flashlm::error::RuntimeError;
use flashlm::forward::kv::KvDtype;
use flashlm::generate::{Generation, Generator, Request, Transcript, generate_with};
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::{Sampler, Sampling};
use flashlm::speculate::{Draft, Guess, ModelDraft, Speculate, Speculation};
use flashlm::{Model, Result, Session};
use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_tests::{
    budgets, bundle_with_predictors, copied, loaded, options, pack_checkpoint, run, scratch, tiny_falcon, tiny_opt,
};

const CONTEXT: usize = 96;
const TOKENS: usize = 28;
/// A passage that is said twice: what follows is a copy for a while.
const PROMPT: [u32; 14] = [2, 713, 16, 901, 44, 17, 350, 12, 713, 16, 901, 44, 17, 350];

fn samplings() -> [Sampling; 4] {
    let greedy = Sampling::default();
    let drawn = Sampling { temperature: 0.8, seed: 5, ..greedy };
    [
        greedy,
        Sampling { repetition_penalty: 1.3, ..greedy },
        drawn,
        Sampling { repetition_penalty: 1.2, top_p: 0.9, top_k: 60, seed: 9, ..drawn },
    ]
}

fn said(forward: &mut Forward, speculation: Option<Speculation>, sampling: Sampling) -> (Vec<u32>, Generation) {
    forward.truncate(0);
    let mut sampler = Sampler::new(sampling, forward.spec().vocab_size);
    let mut ids = Vec::new();
    let request = Request { prompt: &PROMPT, tokens: TOKENS, eos: &[], stop_ids: &[] };
    let report = generate_with(forward, speculation, &mut sampler, &request, &mut |token| {
        ids.push(token.id);
        ControlFlow::Continue(())
    });
    // What is drawn next is what would be drawn without guesses.
    ids.push(sampler.choose(&mut vec![0.0; forward.spec().vocab_size]));
    (ids, report.expect("the prompt is good"))
}

/// Knows what will be said, and lies about every `wrong`th token.
struct Oracle {
    text: Vec<u32>,
    wrong: usize,
}

impl Draft for Oracle {
    fn guess(&mut self, text: &[u32], drafted: &[u32], _: &Sampler) -> Result<Option<Guess>> {
        let at = text.len() + drafted.len() - PROMPT.len();
        let id = self.text.get(at).map(|id| if at % self.wrong == self.wrong - 1 { id ^ 1 } else { *id });
        Ok(id.map(|id| Guess { id, class: 7, is_usual: true }))
    }

    fn expected(&self, _: usize) -> f64 {
        1.0
    }
}

fn ways(bundle: &Bundle) -> Vec<LoadOptions> {
    let base = |ffn| LoadOptions { batch: 9, ..options(CONTEXT, ffn) };
    let (smallest, largest) = budgets(bundle, &base(FfnChoice::Flash));
    let between = LoadOptions { budget: Some(smallest + (largest - smallest) / 3), ..base(FfnChoice::Flash) };
    let mut ways = vec![between, base(FfnChoice::Resident)];
    ways.push(LoadOptions { batch: 3, ..base(FfnChoice::Streamed) });
    ways.push(LoadOptions { kv: Some(KvDtype::Int8), ..base(FfnChoice::Resident) });
    ways
}

#[test]
fn a_text_is_the_same_whoever_guesses() {
    for (checkpoint, look_ahead) in [(tiny_opt(), true), (tiny_falcon(), false)] {
        let dir = scratch();
        let path = dir.path().join("model.flashlm");
        let bundle = bundle_with_predictors(&checkpoint, &path, LayoutOptions::default(), look_ahead);
        let without_guesses = |kv| {
            let mut plain = loaded(&bundle, &LoadOptions { kv, ..options(CONTEXT, FfnChoice::Resident) });
            samplings().map(|sampling| said(&mut plain, None, sampling).0)
        };
        for way in ways(&bundle) {
            let expected = without_guesses(way.kv);
            assert!(expected[0] != expected[2] && expected[0] != expected[1]);
            let mut forward = loaded(&bundle, &way);
            for (sampling, expected) in samplings().into_iter().zip(&expected) {
                for how in [Speculate::Auto, Speculate::Guesses(8)] {
                    let (ids, _) = said(&mut forward, Some(Speculation::new(how, None)), sampling);
                    assert_eq!(ids, *expected, "{how:?}, {sampling:?}, {way:?}");
                    for wrong in [1, 3, 100] {
                        let oracle = Oracle { text: expected[..TOKENS].to_vec(), wrong };
                        let speculation = Speculation::new(how, Some(Box::new(oracle)));
                        let (ids, report) = said(&mut forward, Some(speculation), sampling);
                        assert_eq!(ids, *expected, "{how:?}, every {wrong} wrong, {sampling:?}, {way:?}");
                        let counters = report.speculation;
                        assert_eq!(counters.rows, counters.steps + counters.drafted);
                        assert_eq!(counters.steps + counters.accepted, TOKENS as u64 - 1);
                        assert_eq!(report.decode.len(), TOKENS - 1);
                        if wrong == 100 && how == Speculate::Guesses(8) && way.batch == 9 {
                            assert_eq!((counters.drafted, counters.steps), (counters.accepted, 3), "{counters:?}");
                        }
                    }
                }
            }
        }
    }
}

/// The ids of turns of `tokens` tokens, the first of them given up after `given` tokens; each turn after the first says one id.
fn turns(
    executor: &mut Executor,
    sequence: SequenceId,
    speculation: Option<Speculation>,
    stop_ids: &[u32],
    given: usize,
) -> Vec<Vec<u32>> {
    executor.truncate(sequence, 0);
    let sampling = Sampling { temperature: 0.8, repetition_penalty: 1.1, seed: 3, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, executor.spec().vocab_size);
    let mut transcript = Transcript::new(executor, sequence, speculation);
    let mut all = Vec::new();
    for (turn, prompt) in [&PROMPT[..], &[77], &[]].into_iter().enumerate() {
        let request = Request { prompt, tokens: 12, eos: &[], stop_ids };
        let mut generator = Generator::new(executor, &mut transcript, &mut sampler, &request);
        let mut ids = Vec::new();
        while let Some(token) = generator.next(executor, &mut transcript, &mut sampler).expect("the ids are good") {
            ids.push(token.id);
            if turn == 0 && ids.len() == given {
                break;
            }
        }
        all.push(ids);
    }
    all.push(transcript.ids().to_vec());
    all
}

#[test]
fn a_text_that_stops_between_guesses_goes_on_as_if_there_had_been_none() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    let mut executor =
        loaded(&bundle, &LoadOptions { batch: 6, ..options(CONTEXT, FfnChoice::Resident) }).into_executor();
    let sequence = executor.open(CONTEXT).unwrap();
    let whole = turns(&mut executor, sequence, None, &[], 12).remove(0);
    for given in 1..=12 {
        for stop_ids in [&[][..], &whole[5..6], &whole[8..9]] {
            let expected = turns(&mut executor, sequence, None, stop_ids, given);
            let oracle = Oracle { text: whole.clone(), wrong: 100 };
            let speculation = Speculation::new(Speculate::Guesses(5), Some(Box::new(oracle)));
            assert_eq!(turns(&mut executor, sequence, Some(speculation), stop_ids, given), expected, "{given}");
        }
    }
}

/// Another model with the tokenizer of tiny-opt: with fewer positions than most contexts, and a file that is not the same to the byte.
fn draft(dir: &std::path::Path) -> std::path::PathBuf {
    let checkpoint = copied(&tiny_opt());
    let tokenizer = checkpoint.path().join("tokenizer.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&tokenizer).unwrap()).unwrap();
    fs::write(&tokenizer, json.to_string()).unwrap();
    let path = dir.join("draft.flashlm");
    pack_checkpoint(checkpoint.path(), &path);
    path
}

fn spoken(session: &mut Session<'_>, prompt: &str) -> (String, u64, u64) {
    let mut generation = session.generate(prompt).unwrap();
    let text = (&mut generation).map(|token| token.unwrap().text).collect();
    let counters = generation.report().speculation;
    (text, counters.drafted, counters.accepted)
}

#[test]
fn a_draft_model_guesses_within_the_budget() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = pack_checkpoint(&tiny_opt(), &path);
    let draft = draft(dir.path());
    let text = "Once upon a time there was a dog.";
    for sampling in samplings() {
        let alone = Model::open(&path).unwrap().context(CONTEXT).speculate(Speculate::Off).load().unwrap();
        let mut session = alone.session().unwrap().sampling(sampling).max_tokens(TOKENS);
        let (first, drafted, _) = spoken(&mut session, text);
        assert_eq!(drafted, 0);
        let second = spoken(&mut session, " The cat").0;
        for how in [Speculate::Guesses(4), Speculate::Auto] {
            let mut options = Model::open(&path).unwrap().context(CONTEXT).speculate(how).draft(&draft).unwrap();
            options.options_mut().sequences = 2;
            let model = options.load().unwrap();
            let mut session = model.session().unwrap().sampling(sampling).speculate(how).max_tokens(TOKENS);
            let (text, drafted, accepted) = spoken(&mut session, text);
            assert_eq!(text, first, "{how:?}, {sampling:?}");
            if how != Speculate::Auto {
                // The same weights, so it guesses what will be chosen, where it is asked.
                assert!(accepted > 10 && 2 * accepted > drafted, "{accepted} of {drafted}, {sampling:?}");
            }
            assert_eq!(spoken(&mut session, " The cat").0, second, "{how:?}, {sampling:?}");
            assert!(model.session().is_ok(), "the draft has room for both");
        }
    }

    // It takes its share of the budget, and what is too little is said with what is enough.
    let path = path.to_str().unwrap();
    let draft = draft.to_str().unwrap();
    let planned = |args: &[&str]| -> serde_json::Value {
        let args = [&["plan", path, "--json"], args].concat();
        serde_json::from_str(&run("flashlm", &args, "").succeeded()).unwrap()
    };
    let (without, with) = (planned(&[]), planned(&["--draft", draft]));
    let of_draft = with["items"]["draft model"].as_u64().unwrap();
    assert!(of_draft > 15_000_000, "{with}");
    let smallest = |plan: &serde_json::Value| plan["smallest_budget_bytes"].as_u64().unwrap();
    assert!(smallest(&with) >= smallest(&without) + of_draft);
    let budget = (smallest(&with) - 1).to_string();
    let args = ["run", path, "--prompt", "a", "--context", "256", "--memory", &budget, "--draft", draft];
    run("flashlm", &args, "").failed(1, &["is too small", "the smallest that works is --memory"]);
    drop(bundle);
}

#[test]
fn a_draft_with_other_tokens_is_refused_by_name() {
    let dir = scratch();
    let (path, other) = (dir.path().join("model.flashlm"), dir.path().join("other.flashlm"));
    pack_checkpoint(&tiny_opt(), &path);
    let checkpoint = copied(&tiny_opt());
    let tokenizer = checkpoint.path().join("tokenizer.json");
    let text = fs::read_to_string(&tokenizer).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let name = |id: u64| vocab.iter().find(|(_, at)| at.as_u64() == Some(id)).unwrap().0.clone();
    let (one, two) = (name(700), name(701));
    vocab[&one] = 701.into();
    vocab[&two] = 700.into();
    fs::write(&tokenizer, json.to_string()).unwrap();
    pack_checkpoint(checkpoint.path(), &other);
    let [path, other] = [&path, &other].map(|path| path.to_str().unwrap());
    for command in ["run", "plan"] {
        let prompt: &[&str] = if command == "run" { &["--prompt", "a"] } else { &[] };
        let said = run("flashlm", &[&[command, path, "--draft", other], prompt].concat(), "");
        said.failed(1, &[other, path, "id 700", "the same tokenizer"]);
    }
}

#[test]
fn guesses_take_little_of_a_budget_and_no_more() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    let base = LoadOptions { ffn: None, ..options(CONTEXT, FfnChoice::Flash) };
    let auto = LoadOptions { speculate: Speculate::Auto, ..base.clone() };
    let least = |options: &LoadOptions| match plan(&bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        other => panic!("{:?}", other.map(|planned| planned.plan)),
    };
    assert_eq!(least(&auto), least(&base), "the smallest budget is that without guesses");
    let mut rows = Vec::new();
    for step in 0..40 {
        let bytes = least(&base) + step * (1 << 20);
        let budget = Some(bytes);
        let with = plan(&bundle, &LoadOptions { budget, ..auto.clone() }).unwrap();
        let without = plan(&bundle, &LoadOptions { budget, ..base.clone() }).unwrap();
        assert!(with.plan.total() <= bytes);
        assert_eq!((with.choice, with.fallback.is_some()), (without.choice, without.fallback.is_some()));
        rows.push(with.batch);
    }
    assert_eq!(rows.last(), Some(&Speculate::Auto.rows()), "{rows:?}");
    let three = LoadOptions { speculate: Speculate::Guesses(3), ..base.clone() };
    assert!(least(&three) > least(&base));
    assert_eq!(plan(&bundle, &three).unwrap().batch, 4);
}

#[test]
fn the_command_says_what_was_guessed() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    let path = path.to_str().unwrap();
    let told = |how: &str| -> (String, serde_json::Value) {
        let args = ["run", path, "--ids", "2,713,16,901,713,16,901", "-n", "30", "--json", "--speculate", how];
        let said = run("flashlm", &args, "").succeeded();
        let last = said.lines().last().unwrap();
        let ids =
            said.lines().filter_map(|line| line.split_once("\"id\":").map(|(_, rest)| rest.split_once(',').unwrap().0));
        (ids.collect(), serde_json::from_str(last).unwrap())
    };
    let (text, off) = told("off");
    assert_eq!((&off["speculation"]["drafted"], &off["speculation"]["rows_per_step"]), (&0.into(), &1.0.into()));
    assert_eq!(off["speculation"]["neuron_union"], 1.0);
    let (same, four) = told("4");
    assert_eq!(same, text);
    let figures = &four["speculation"];
    let number = |name: &str| figures[name].as_f64().unwrap_or_else(|| panic!("no {name} in {figures}"));
    assert!(number("drafted") > 0.0 && number("accepted") <= number("drafted"), "{figures}");
    assert!(number("rows_per_step") > 1.0 && number("neuron_union") > 1.0, "{figures}");
    assert!(number("neuron_union") <= number("rows_per_step"), "{figures}");
    for (how, words) in [("0", "from 1 to 31"), ("yes", "auto, off")] {
        run("flashlm", &["run", path, "--prompt", "a", "--speculate", how], "").failed(2, &[words]);
    }
    drop(bundle);
}

#[test]
fn a_draft_model_that_is_shorter_leaves_the_rest_alone() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = pack_checkpoint(&tiny_opt(), &path);
    let mut forward = loaded(&bundle, &LoadOptions { batch: 4, ..options(CONTEXT, FfnChoice::Resident) });
    let expected = said(&mut forward, None, Sampling::default()).0;
    let short = loaded(&bundle, &options(PROMPT.len() + 9, FfnChoice::Resident)).into_executor();
    let short = std::sync::Arc::new(std::sync::Mutex::new(short));
    let vocab = bundle.spec().vocab_size;
    let guesses = ModelDraft::open(&short, Sampling::default(), vocab).unwrap();
    let full = ModelDraft::open(&short, Sampling::default(), vocab);
    assert!(matches!(full, Err(RuntimeError::NoRoomForSequence { .. })));
    let speculation = Speculation::new(Speculate::Guesses(3), Some(Box::new(guesses)));
    let (ids, report) = said(&mut forward, Some(speculation), Sampling::default());
    assert_eq!(ids, expected);
    assert!(report.speculation.accepted >= 6, "{:?}", report.speculation);
    assert!(ModelDraft::open(&short, Sampling::default(), vocab).is_ok(), "its sequence was given back");
}
