//! Attack 30: every way to run the same bundle with the same seed.

use std::num::NonZeroUsize;

use flashlm::cache::PolicyKind;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::planner::ReadPlan;
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::LayoutOptions;
use flashlm_io::{DirectIo, EngineChoice};
use flashlm_tests::{budgets, bundle_with_predictors, continuation, loaded, options, scratch, tiny_falcon, tiny_opt};

#[test]
fn a30_the_grid_of_engines_threads_budgets_and_policies() {
    let whole = crate::whole();
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 11, ..Sampling::default() };
    let prompt: Vec<u32> = (0..21).map(|i| 2 + i * 97 % 4000).collect();
    let tokens = if whole { 40 } else { 8 };
    let checkpoints = if whole { vec![tiny_opt(), tiny_falcon()] } else { vec![tiny_opt()] };
    for checkpoint in checkpoints {
        let dir = scratch();
        let bundle = bundle_with_predictors(&checkpoint, &dir.path().join("m"), LayoutOptions::default(), true);
        let base = options(80, FfnChoice::Flash);
        // Threads take memory: those that compute, and those of an engine.
        let most = LoadOptions {
            engines: EngineChoice::Threads.into(),
            threads: NonZeroUsize::new(5).unwrap(),
            ..base.clone()
        };
        let (smallest, largest) = budgets(&bundle, &most);
        let mut reference = None;
        let mut ways = 0;
        for engine in [EngineChoice::Auto, EngineChoice::Threads] {
            for threads in [1, 2, 5] {
                for budget in [smallest, (smallest + largest) / 2, largest] {
                    for policy in PolicyKind::ALL {
                        ways += 1;
                        let others =
                            [(DirectIo::Optional, true, None), (DirectIo::Disabled, false, Some(ReadPlan::Groups))];
                        let others = if whole { &others[..] } else { &others[ways % 2..][..1] };
                        for &(direct, look_ahead, reads) in others {
                            let threads = NonZeroUsize::new(threads).unwrap();
                            let budget = Some(budget);
                            let way = LoadOptions {
                                engines: engine.into(),
                                threads,
                                budget,
                                policy: Some(policy),
                                direct,
                                look_ahead,
                                reads,
                                ..base.clone()
                            };
                            let ids = continuation(&mut loaded(&bundle, &way), &prompt, tokens, sampling);
                            assert_eq!(*reference.get_or_insert_with(|| ids.clone()), ids, "{way:?}");
                        }
                    }
                }
            }
        }
        eprintln!("grid: {ways} ways, one text");
    }
}
