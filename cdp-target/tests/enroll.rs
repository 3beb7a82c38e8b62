//! What a bundle is good for, and what becomes of a bad one: each row a clear error, and nothing enrolled.

#![expect(clippy::disallowed_methods, reason = "a test that breaks what a crash could have left unfinished")]

mod support;

use cdp_protocol::bundle::BundleError;
use cdp_protocol::join::JoinRefusal;
use cdp_seams::clock::{Clock, SimClock};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use cdp_source::connect::ConnectError;
use cdp_source::join::JoinError;
use cdp_target::authority::Authority;
use cdp_target::enroll::{EnrollError, NotAdmitted, OfficeState};
use cdp_target::listener::{ListenerLimits, Refusal};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;
use support::{Office, Target, now_ms, within};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(flavor = "multi_thread")]
async fn an_office_joins_and_is_known_by_its_certificate_alone() {
    let mut target = Target::start(ListenerLimits::default());
    let bundle = target.invite("north", false).expect("a bundle");
    let office = Office::new(target.clock.clone());
    let joined = office.join(bundle.to_text().as_bytes(), None).await.expect("joined");
    assert_eq!((joined.target.office, joined.target.office_name.as_str()), (bundle.office, "north"));
    assert_eq!(joined.clock_warning(), None);

    let line = within(office.connect()).await.expect("connected");
    let served = within(target.served.recv()).await.expect("served");
    assert_eq!((served.office, served.name.as_str()), (bundle.office, "north"));
    drop(line);

    for (folder, secrets) in [
        (office.state.path().join("identity"), vec!["office.key"]),
        (target.folder.path().join("authority"), vec!["ca.key", "server.key", "escrow.key", "offices.json"]),
    ] {
        for secret in secrets {
            let mode = folder.join(secret).metadata().expect("a file").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
    }

    // The registry outlives the process.
    let folder = target.folder.path().join("authority");
    let clock: Arc<dyn Clock> = target.clock.clone();
    let reopened = Authority::open(Arc::new(SystemStorage), clock, Arc::new(SystemRandom), &folder).expect("opened");
    let admitted = reopened.admit(&office.credentials().certificate).expect("known");
    assert_eq!(admitted.office, bundle.office);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_works_once_in_time_and_for_its_target_only() {
    let target = Target::start(ListenerLimits::default());
    let other = Target::start(ListenerLimits::default());

    let used = target.invite("north", false).expect("a bundle").to_text();
    Office::new(target.clock.clone()).join(used.as_bytes(), None).await.expect("joined");
    let thief = Office::new(target.clock.clone());
    let error = thief.join(used.as_bytes(), None).await.expect_err("used twice");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::AlreadyUsed)), "{error}");
    assert_eq!(error.to_string(), "the bundle was already used");

    let south = target.invite("south", false).expect("a bundle").to_text();
    let office = Office::new(target.clock.clone());
    let error = office.join(south.as_bytes(), Some(&other.address.to_string())).await.expect_err("another target");
    assert!(matches!(error, JoinError::Connect(ConnectError::WrongTarget { .. })), "{error}");
    assert!(error.hint().is_some());

    for len in 0..south.len() - 1 {
        let error = office.join(&south.as_bytes()[..len], None).await.expect_err("cut short");
        assert!(matches!(error, JoinError::Bundle(BundleError::CutShort)), "cut to {len}: {error}");
    }

    let newer = target.invite("south", false).expect("another bundle").to_text();
    let error = office.join(south.as_bytes(), None).await.expect_err("replaced by a newer one");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::Unknown)), "{error}");

    target.clock.advance(HOUR * 25);
    let error = office.join(newer.as_bytes(), None).await.expect_err("expired");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::Expired { .. })), "{error}");
    assert_eq!(error.to_string(), "the bundle has expired");
    target.counts(Refusal::Join, 3).await;

    let states: Vec<(String, OfficeState)> = {
        let authority = target.authority.lock().expect("not poisoned");
        let state = |office: &cdp_target::enroll::Office| {
            (office.name.clone(), office.state(cdp_protocol::units::Timestamp(target.clock.wall_ms())))
        };
        authority.offices().iter().map(state).collect()
    };
    assert_eq!(states, [("north".to_owned(), OfficeState::Enrolled), ("south".to_owned(), OfficeState::Expired)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_lost_is_asked_for_again_with_the_same_key() {
    let mut target = Target::start(ListenerLimits::default());
    let bundle = target.invite("north", false).expect("a bundle").to_text();
    let office = Office::new(target.clock.clone());
    office.join(bundle.as_bytes(), None).await.expect("joined");
    // As if the first answer had not been stored: the key is there, the rest is not.
    std::fs::remove_file(office.state.path().join("identity/target.json")).expect("removed");
    let first = office.credentials().certificate;
    office.join(bundle.as_bytes(), None).await.expect("joined again");
    assert_eq!(target.authority.lock().expect("not poisoned").admit(&first), Err(NotAdmitted::Revoked));
    target.serves(&office).await;
    let error = office.join(bundle.as_bytes(), None).await.expect_err("joined already");
    assert!(matches!(error, JoinError::AlreadyJoined { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_hardware_needs_replace_and_ends_the_old_certificate_when_it_joins() {
    let mut target = Target::start(ListenerLimits::default());
    let old = target.office("north").await;
    let line = target.serves(&old).await;
    assert!(matches!(target.invite("north", false), Err(EnrollError::AlreadyEnrolled(_))));
    assert!(matches!(target.invite("south", true), Err(EnrollError::UnknownOffice(_))));
    assert!(matches!(target.invite("../north", false), Err(EnrollError::Name(_))));

    let bundle = target.invite("north", true).expect("a bundle");
    target.serves(&old).await;

    let new = Office::new(target.clock.clone());
    let joined = new.join(bundle.to_text().as_bytes(), None).await.expect("joined");
    within(line.closed()).await;
    let error = within(old.connect()).await.err().expect("revoked");
    let enrolled_anew = |reason: &str| reason.contains("enrolled anew on other hardware");
    assert!(matches!(&error, ConnectError::Refused { reason, .. } if enrolled_anew(reason)), "{error}");
    target.serves(&new).await;
    let offices = target.authority.lock().expect("not poisoned").offices().to_vec();
    assert_eq!(offices.len(), 1);
    assert_eq!(offices[0].id, joined.target.office, "the office is the same one");
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_hours_apart_are_worth_a_warning_and_nothing_more() {
    let mut target = Target::start(ListenerLimits::default());
    for (name, hours) in [("ahead", 9), ("behind", -9)] {
        let bundle = target.invite(name, false).expect("a bundle").to_text();
        let office = Office::new(Arc::new(SimClock::new(now_ms() + hours * 3_600_000)));
        let joined = office.join(bundle.as_bytes(), None).await.expect("joined");
        assert!(joined.clock_warning().is_some_and(|warning| warning.contains(name)), "{name}");
        target.serves(&office).await;
    }
}
