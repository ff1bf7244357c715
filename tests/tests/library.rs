//! The library as its users see it: one front door, and the text of the command.

use std::process::Command;

use flashlm::{Error, Finish, Model, Result, Sampling};
use flashlm_formats::bundle::LayoutOptions;
use flashlm_prep::{Event, Outcome, PrepareError, PrepareOptions, prepare};
use flashlm_tests::{bundle_with_predictors, example, root, run, scratch, tiny_opt};

const PROMPTS: [&str; 3] = ["Once upon a time", "The dog was", "Lily and her mother went to the park."];

/// The example model with predictors, in a directory of the test's own.
fn bundle() -> (tempfile::TempDir, String) {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    let path = path.to_str().expect("the path is plain").to_owned();
    (dir, path)
}

fn drawn(seed: u64) -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::default() }
}

#[test]
fn the_library_and_the_command_give_one_text() {
    let (_dir, path) = bundle();
    let model = Model::open(&path).unwrap().load().unwrap();
    for (seed, prompt) in (1..).zip(PROMPTS) {
        let mut session = model.session().unwrap().sampling(drawn(seed)).max_tokens(24);
        let text: String = session.generate(prompt).unwrap().map(|token| token.unwrap().text).collect();
        drop(session);
        let seed = seed.to_string();
        let args =
            ["run", &path, "--prompt", prompt, "-n", "24", "--temperature", "0.9", "--top-p", "0.95", "--seed", &seed];
        assert_eq!(run("flashlm", &args, "").succeeded(), text.clone() + "\n", "{prompt}");
        assert!(text.len() > 20, "{text:?}");
    }
}

#[test]
fn sessions_that_take_turns_say_what_each_says_alone() {
    let (_dir, path) = bundle();
    let alone: Vec<String> = {
        let model = Model::open(&path).unwrap().context(64).load().unwrap();
        let text = |(seed, prompt): (u64, &&str)| {
            let mut session = model.session().unwrap().sampling(drawn(seed)).max_tokens(20);
            session.generate(prompt).unwrap().map(|token| token.unwrap().text).collect()
        };
        (0..).zip(&PROMPTS).map(text).collect()
    };
    let mut options = Model::open(&path).unwrap().context(64).sessions(3);
    // Hardly a neuron is kept.
    options.options_mut().budget = Some(1);
    options.options_mut().ffn = Some(flashlm::options::FfnChoice::Flash);
    let needed = match options.plan() {
        Err(Error::BudgetTooSmall { needed, .. }) => needed,
        other => panic!("{:?}", other.map(|planned| planned.plan)),
    };
    options.options_mut().budget = Some(needed);
    let model = options.load().unwrap();
    let open = |seed| model.session().unwrap().sampling(drawn(seed)).max_tokens(20);
    let mut sessions: Vec<_> = (0..3).map(open).collect();
    let mut generations: Vec<_> =
        sessions.iter_mut().zip(PROMPTS).map(|(session, prompt)| session.generate(prompt).unwrap()).collect();
    let mut texts = vec![String::new(); 3];
    let mut under_way = true;
    while under_way {
        under_way = false;
        for (generation, text) in generations.iter_mut().zip(&mut texts) {
            if let Some(token) = generation.next() {
                *text += &token.unwrap().text;
                under_way = true;
            }
        }
    }
    assert_eq!(texts, alone);
    assert!(matches!(model.session(), Err(Error::NoRoomForSequence { .. })), "all three are taken");
    drop(generations);
    sessions.pop();
    assert!(model.session().is_ok(), "one was given back");
}

#[test]
fn a_turn_ends_where_it_is_told_to_and_the_next_goes_on() {
    let (_dir, path) = bundle();
    let model = Model::open(&path).unwrap().context(96).load().unwrap();
    let text =
        |generation: flashlm::Generation<'_, '_>| -> Result<String> { generation.map(|t| Ok(t?.text)).collect() };
    let mut whole = model.session().unwrap().max_tokens(40);
    let all = text(whole.generate(PROMPTS[0]).unwrap()).unwrap();
    assert!(
        matches!(whole.generate(&"word ".repeat(200)), Err(Error::ContextFull { .. })),
        "there is no room for that"
    );
    drop(whole);

    // A stop string is not shown, nor is anything after it.
    let stop = all.split_whitespace().nth(4).unwrap();
    let mut stopped = model.session().unwrap().max_tokens(40).stop(stop);
    let mut generation = stopped.generate(PROMPTS[0]).unwrap();
    let shown: String = (&mut generation).map(|token| token.unwrap().text).collect();
    assert_eq!(generation.report().finish, Finish::Stopped);
    assert_eq!(shown, all[..all.find(stop).unwrap()]);
    drop(stopped);

    // Ten tokens, and then the others: the text of one turn, but that nothing is said between.
    let mut parts = model.session().unwrap().max_tokens(10);
    let first = text(parts.generate(PROMPTS[0]).unwrap()).unwrap();
    assert!(all.starts_with(&first), "{first:?} of {all:?}");
    let said = parts.len();
    let mut rest = parts.generate_from(&[]).unwrap();
    let next = rest.next().unwrap().unwrap();
    assert!(all.starts_with(&(first + &next.text)), "{next:?}");
    drop(rest);
    assert_eq!(parts.len(), said + 1);
    parts.clear();
    assert!(parts.is_empty());
    assert_eq!(all, {
        let mut again = parts.max_tokens(40);
        text(again.generate(PROMPTS[0]).unwrap()).unwrap()
    });
}

#[test]
fn what_was_not_said_leaves_no_trace() {
    let (_dir, path) = bundle();
    let model = Model::open(&path).unwrap().context(96).load().unwrap();
    let text = |generation: flashlm::Generation<'_, '_>| -> String { generation.map(|t| t.unwrap().text).collect() };
    let two_turns = |between: &dyn Fn(&mut flashlm::Session<'_>)| {
        let mut session = model.session().unwrap().max_tokens(8);
        let first = text(session.generate(PROMPTS[0]).unwrap());
        between(&mut session);
        let len = session.len();
        let second = text(session.generate(PROMPTS[1]).unwrap());
        (first, len, second)
    };
    let expected = two_turns(&|_| ());
    // Turns that were begun and given up before their first token.
    assert_eq!(two_turns(&|session| drop(session.generate("Something else").unwrap())), expected);
    // Ids that the model does not have: refused when they are fed.
    let refused = |session: &mut flashlm::Session<'_>| {
        let mut generation = session.generate_from(&[5, u32::MAX]).unwrap();
        assert!(matches!(generation.next(), Some(Err(Error::TokenOutOfRange { .. }))));
        assert!(generation.next().is_none(), "after an error there is nothing");
    };
    assert_eq!(two_turns(&refused), expected);
    // Logits that somebody does not want to the end.
    let stopped = |session: &mut flashlm::Session<'_>| {
        let enough = &mut |at: usize, _: &[f32]| if at == 1 { Err(Error::EmptyPrompt) } else { Ok(()) };
        assert!(session.logits(&[5, 6, 7], enough).is_err());
    };
    assert_eq!(two_turns(&stopped), expected);
}

#[test]
fn the_hosts_panic_hook_is_its_own() {
    let (_dir, path) = bundle();
    std::panic::set_hook(Box::new(|_| ()));
    let ours = std::panic::take_hook();
    let address = |hook: &dyn Fn(&std::panic::PanicHookInfo<'_>)| std::ptr::from_ref(hook).cast::<()>() as usize;
    let before = address(&*ours);
    std::panic::set_hook(ours);
    Model::open(&path).unwrap().load().unwrap();
    let after = std::panic::take_hook();
    assert_eq!(address(&*after), before, "loading a model put another hook in its place");
}

#[test]
fn the_examples_do_what_they_say() {
    let (_dir, path) = bundle();
    let said = |name: &str, args: &[&str], stdin: &str| {
        let mut command = assert_cmd::Command::from_std(Command::new(example(name)));
        let output =
            command.arg(&path).args(args).write_stdin(stdin).timeout(std::time::Duration::from_secs(60)).output();
        let output = output.expect("the example starts");
        assert!(output.status.success(), "{name}: {output:?}");
        String::from_utf8(output.stdout).expect("examples write UTF-8")
    };
    assert!(said("generate", &[PROMPTS[0], "40MB"], "").starts_with(PROMPTS[0]));
    assert!(said("stream", &[PROMPTS[0]], "").starts_with(PROMPTS[0]));
    assert_eq!(said("logits", &[PROMPTS[0]], "").lines().count(), 5);
    assert!(said("conversation", &[], "Once upon a time\n\nThere was\n").lines().count() >= 2);
}

#[test]
fn a_checkpoint_is_prepared_by_the_example_and_the_library_finds_it_done() {
    let dir = scratch();
    let (bundle, text) = (dir.path().join("model.flashlm"), root().join("examples/synthetic.txt"));
    let mut command = assert_cmd::Command::from_std(Command::new(example("prepare")));
    let output = command.args([&tiny_opt(), &bundle, &text]).timeout(std::time::Duration::from_secs(300)).output();
    let output = output.expect("the example starts");
    let said = String::from_utf8(output.stdout).expect("examples write UTF-8");
    let told = String::from_utf8(output.stderr).expect("examples write UTF-8");
    assert!(output.status.success(), "{told}");
    assert!(said.ends_with("% of the neurons active\n"), "{said:?}");
    for words in ["preparing a model of family opt", "100 %", "layer   7:", "packing"] {
        assert!(told.contains(words), "no {words:?} in {told}");
    }
    let model = Model::open(&bundle).unwrap().load().unwrap();
    assert!(model.session().unwrap().max_tokens(4).generate(PROMPTS[0]).unwrap().count() > 0);

    let mut options = PrepareOptions { tokens: Some(2000), ..PrepareOptions::new(tiny_opt(), &bundle) };
    options.text.push(text);
    let begun = std::sync::Mutex::new(Vec::new());
    let prepared = prepare(&options, &|event| {
        if let Event::Began(task) = event {
            begun.lock().unwrap().push(task);
        }
    });
    assert_eq!(prepared.unwrap().outcome, Outcome::UpToDate);
    let begun = begun.into_inner().unwrap();
    assert_eq!(begun.iter().map(ToString::to_string).collect::<Vec<_>>(), ["reading the checkpoint", "verifying"]);
    // Nothing is asked of a command line, so what cannot be is refused here, too.
    let nonsense = PrepareOptions { recall: 2.0, ..options };
    assert!(matches!(prepare(&nonsense, &|_| ()), Err(PrepareError::Option { name: "recall", .. })));
}
