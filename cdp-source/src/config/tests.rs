//! What is read, refused and changed in place.

use super::*;

fn volume(name: &str, slot: u16) -> VolumeConfig {
    VolumeConfig {
        name: name.into(),
        slot: VolumeSlot(slot),
        device: format!("/dev/{name}").into(),
        tracker: TrackerChoice::Auto,
    }
}

#[test]
fn volumes_come_and_go_and_comments_stay() {
    let text = "# ours\nmetrics_listen = \"127.0.0.1:9108\" # scraped\n";
    let text = with_volume(text, "main", &volume("data", 0)).expect("added");
    let text = with_volume(&text, "main", &volume("log", 1)).expect("added");
    let text = without_volume(&text, "main", "data").expect("removed");
    assert!(text.contains("# ours") && text.contains("# scraped"), "{text}");
    let config = Config::parse(&text).expect("valid");
    assert_eq!(config.groups["main"].volumes, [volume("log", 1)]);
    assert_eq!(config.groups["main"].interval_ms, 1000);
    assert_eq!(config.groups["main"].cut_bound_ms(), 250);
}

#[test]
fn every_interval_that_is_allowed_has_a_bound_that_is() {
    for (interval_ms, bound_ms) in [(20, 100), (1000, 250), (300_000, 60_000), (86_400_000, 60_000)] {
        let config = Config::parse(&format!("[groups.main]\ninterval_ms = {interval_ms}")).expect("valid");
        assert_eq!(config.groups["main"].cut_bound_ms(), bound_ms, "{interval_ms}");
    }
}

#[test]
fn the_closest_known_key_is_named_at_every_level() {
    for (text, closest) in [
        ("metrics_listn = 1", "metrics_listen"),
        ("[groups.main]\nintervall_ms = 1", "interval_ms"),
        ("[groups.main]\nexcludes = []", "exclude"),
        ("[[groups.main.volumes]]\ndevise = 'x'", "device"),
        ("[groups.main]\nhooks.precut = ['/x']", "pre_cut"),
    ] {
        let error = Config::parse(text).expect_err("unknown key");
        assert_eq!(error.hint(), Some(format!("did you mean `{closest}`?")), "{text}");
    }
}

#[test]
fn values_out_of_range_and_contradictions_are_refused() {
    let two = |a: &str, b: &str| format!("[[groups.main.volumes]]\n{a}\n[[groups.main.volumes]]\n{b}\n");
    for (text, part) in [
        ("packing = 'zstd-20'".to_owned(), "is none of"),
        ("[groups.main]\ninterval_ms = 0".to_owned(), "interval_ms = 0"),
        ("[groups.main]\ninterval_ms = -5".to_owned(), "read source.toml"),
        ("[groups.main]\ncut_bound_ms = 0".to_owned(), "cut_bound_ms = 0"),
        ("[groups.main]\ncapture_bytes_max = 7".to_owned(), "capture_bytes_max = 7"),
        ("[groups.main]\nspool_bytes_max = 1".to_owned(), "spool_bytes_max = 1 is neither 0"),
        ("[groups.main]\nspool_points_max = 1".to_owned(), "spool_points_max = 1 is not"),
        ("[groups.main]\nfreeze = 'always'".to_owned(), "read source.toml"),
        ("[groups.main]\nfreeze_deadline_ms = 5".to_owned(), "freeze_deadline_ms = 5"),
        ("[groups.main]\nhooks.pre_cut = []".to_owned(), "hooks.pre_cut is empty"),
        ("[groups.main]\nhooks.pre_cut = '/x'".to_owned(), "read source.toml"),
        ("[groups.main]\nhooks.pre_cut = ['sh']".to_owned(), "hooks.pre_cut does not begin with"),
        ("[groups.main]\nhooks.post_cut = ['/x']".to_owned(), "read source.toml"),
        ("[groups.main]\nhooks = { pre_cut = ['/x'], deadline_ms = 0 }".to_owned(), "hooks.deadline_ms = 0"),
        ("[groups.main]\nhooks = { pre_cut = ['/x'], every_s = 59 }".to_owned(), "hooks.every_s = 59"),
        ("[groups.'.x']".to_owned(), "a name is"),
        (two("name='a'\nslot=0\ndevice='/a'", "name='a'\nslot=1\ndevice='/b'"), "two volumes are named"),
        (two("name='a'\nslot=0\ndevice='/a'", "name='b'\nslot=0\ndevice='/b'"), "have slot 0"),
        ("[[groups.main.volumes]]\nname='a'\nslot=0\ndevice='a'".to_owned(), "no absolute path"),
        ("[groups.main]\nexclude = ['a']".to_owned(), "exclude: a is no absolute path"),
        (format!("[groups.main]\nexclude = [{}]", "'/a',".repeat(65)), "exclude has 65 files"),
        ("groups = [".to_owned(), "read source.toml"),
    ] {
        let error = Config::parse(&text).expect_err(&text);
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
}

#[test]
fn files_of_the_state_folder_are_not_excluded() {
    let config =
        Config::parse("[groups.main]\nexclude = ['/srv/scratch', '/var/lib/cdp/identity/key.pem']").expect("valid");
    assert!(config.refuse_excludes_in(Path::new("/srv/other")).is_ok());
    let error = config.refuse_excludes_in(Path::new("/var/lib/cdp")).expect_err("refused").to_string();
    assert!(error.contains("/var/lib/cdp/identity/key.pem lies in the state folder"), "{error}");
}
