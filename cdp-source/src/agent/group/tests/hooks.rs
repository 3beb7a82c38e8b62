//! Points with hooks around them: what they are worth, and that a hook that does not do its work holds nothing up.

use super::{Bench, DEADLINE, Reply, Running};
use crate::config::HooksConfig;
use cdp_protocol::message::Verdict;
use cdp_protocol::units::{BLOCK_BYTES, Class};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

impl Bench {
    /// With hooks of these scripts, which run where the bench's files are.
    fn with_hooks(pre_cut: &str, post_cut: &str, deadline_ms: u64) -> Self {
        let mut bench = Self::new();
        let folder = bench.folder.path().display().to_string();
        let shell = |script: &str| ["/bin/sh".into(), "-c".into(), format!("cd {folder}; {script}")].to_vec();
        let (pre_cut, post_cut) = (shell(pre_cut), shell(post_cut));
        bench.hooks = Some(HooksConfig { pre_cut, post_cut, deadline_ms, every_s: 0 });
        bench
    }

    fn running(&self) -> Running {
        self.answer(Verdict::New);
        let running = self.start();
        drop(self.target.until("a point", |target| !target.points.is_empty()));
        running
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let step = Duration::from_millis(5);
    for _ in 0..DEADLINE.as_millis() / step.as_millis() {
        if is_so() {
            return;
        }
        std::thread::park_timeout(step);
    }
    panic!("waited too long until {what}");
}

#[test]
fn a_point_cut_between_its_hooks_is_of_class_application() {
    // What the application writes when it is told to hold still is in the point; what it writes later is not.
    let pre = "printf before | dd of=disk.img bs=4096 seek=100 conv=notrunc status=none";
    let post = "echo $CDP_LABEL $CDP_EPOCH; printf behind | dd of=disk.img bs=4096 seek=100 conv=notrunc status=none";
    let bench = Bench::with_hooks(pre, post, 20_000);
    let running = bench.running();
    for label in ["one", "two"] {
        let point = running.acked_point(Some(label));
        assert_eq!((point.class, point.warning.as_deref()), (Class::Application, None));
        let target = bench.target.lock();
        let (_, commit, image) = target.points.iter().find(|(head, ..)| head.epoch == point.epoch).expect("acked");
        assert_eq!((commit.class, commit.label.as_deref()), (Class::Application, Some(label)));
        assert_eq!(&image[100 * 4096..100 * 4096 + 6], b"before");
        let others = target.points.iter().filter(|(head, ..)| head.epoch != point.epoch);
        assert!(
            others.filter(|(_, commit, _)| commit.label.is_none()).all(|(_, commit, _)| commit.class == Class::Crash)
        );
        drop(target);
        let said = format!("{label} {}", point.epoch);
        let post_cut = || running.status().hooks.and_then(|hooks| hooks.post_cut);
        until("post-cut has run", || post_cut().is_some_and(|run| run.output == said));
    }
    assert_eq!(running.status().hooks.expect("configured").failures, 0);
    running.stop();
}

#[test]
fn a_hook_that_hangs_holds_up_no_other_point() {
    let bench = Bench::with_hooks("touch started; sleep 1000", "touch post; exit 9", 1500);
    let running = bench.running();
    let answer = running.point(Some("wanted"));
    until("the hook runs", || bench.file("started").exists());
    for round in 0..5_u8 {
        bench.write(7, 0x80 + round);
        let target =
            bench.target.until("points go on", |target| target.points.last().is_some_and(|p| p.2 == bench.image()));
        assert!(target.points.iter().all(|(_, commit, _)| commit.label.is_none()), "the hook still hangs");
    }
    let Ok(Reply::Point(point)) = answer.blocking_recv() else { panic!("the point is made all the same") };
    assert_eq!(point.class, Class::Crash);
    assert_eq!(point.warning.as_deref(), Some("the pre-cut hook did not end within 1500 ms, and was killed"));
    until("post-cut has run", || running.status().hooks.is_some_and(|hooks| hooks.failures == 2));
    let hooks = running.status().hooks.expect("configured");
    assert_eq!(hooks.post_cut.expect("it ran").exit_status, Some(9));
    assert!(bench.file("post").exists());
    running.stop();
}

#[test]
fn an_application_is_let_go_though_no_cut_can_be_made() {
    let pre = "touch started; while [ ! -e go ]; do sleep 0.01; done";
    let bench = Bench::with_hooks(pre, "touch post", 20_000);
    let bench = Bench { hooks: bench.hooks.clone().map(|hooks| HooksConfig { deadline_ms: 1000, ..hooks }), ..bench };
    let running = bench.running();
    let answer = running.point(None);
    until("the hook runs", || bench.file("started").exists());
    std::thread::scope(|scope| {
        // A volume that is never the same twice gives no cut by comparing.
        scope.spawn(|| {
            let file = std::fs::OpenOptions::new().write(true).open(bench.image_path()).expect("opened");
            let numbers = (0..u64::from(u32::MAX)).take_while(|_| !bench.file("post").exists());
            numbers
                .for_each(|number| file.write_all_at(&number.to_le_bytes(), 7 * BLOCK_BYTES as u64).expect("written"));
        });
        std::fs::write(bench.file("go"), "").expect("written");
        until("it is let go", || bench.file("post").exists());
    });
    let Ok(Reply::Point(point)) = answer.blocking_recv() else { panic!("the point is made all the same") };
    assert_eq!(point.class, Class::Crash);
    assert_eq!(point.warning.as_deref(), Some("no cut was made while the application held still"));
    running.stop();
}

#[test]
fn an_agent_that_stops_lets_the_application_go() {
    let bench = Bench::with_hooks("touch started; while [ ! -e go ]; do sleep 0.01; done", "touch post", 20_000);
    let running = bench.running();
    let answer = running.point(None);
    until("the hook runs", || bench.file("started").exists());
    std::fs::write(bench.file("go"), "").expect("written");
    running.stop();
    assert!(bench.file("post").exists());
    drop(answer);
}

#[test]
fn points_with_hooks_are_made_in_time_though_nobody_asks() {
    let bench = Bench::with_hooks("echo >> held", "true", 20_000);
    let bench = Bench { hooks: bench.hooks.clone().map(|hooks| HooksConfig { every_s: 1, ..hooks }), ..bench };
    let running = bench.running();
    let is_application = |target: &super::Target| {
        let points = target.points.iter().filter(|(_, commit, _)| commit.class == Class::Application);
        points.count() >= 2
    };
    drop(bench.target.until("two of them", is_application));
    let asked = running.acked_point(Some("asked for"));
    assert_eq!((asked.class, asked.label.as_deref()), (Class::Application, Some("asked for")));
    running.stop();
    assert!(std::fs::read_to_string(bench.file("held")).expect("it ran").lines().count() >= 3);
}
