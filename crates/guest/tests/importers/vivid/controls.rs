//! Sets vivid's controls so that a frame passes through the loopback unchanged.

use std::{
    fs::File,
    io::{self, ErrorKind},
    thread,
    time::Duration,
};

use super::v4l2::{
    CONTROL_BOOLEAN, CONTROL_FIXED, CONTROL_INTEGER, CONTROL_MENU, CONTROL_NEXT, Control, G_CTRL, QUERYCTRL, QUERYMENU,
    QueryControl, QueryMenu, S_CTRL, field_text, ioctl, name_step, vivid_error,
};

/// Maximum number of times to set a link again after vivid has reset it. Resets are rare (see
/// [`keep_link`]), so a link that is reset this often will never hold.
const LINK_TRIES: u32 = 20;
/// How long to wait after setting the link: long enough for vivid's work item to run.
const LINK_SETTLE_TIME: Duration = Duration::from_millis(100);

/// The value that a control needs for a frame to pass unchanged.
enum Setting {
    Value(i32),
    Item(&'static str),
    /// The menu item for an HDMI output of the same vivid instance.
    Link,
}

/// Chooses a setting by the control's name, because the numbers and kinds of vivid's controls
/// differ between kernels. Returns no setting for the controls with "Inject" in their names,
/// because they are buttons that break the device on purpose.
fn choose_setting(name: &str, instance: &str) -> Option<Setting> {
    Some(match name {
        // Controls that turn the loopback on. Older kernels have a switch. On newer ones, the
        // input is connected to an output.
        "Loop Video" => Setting::Value(1),
        _ if name.starts_with("HDMI") && name.ends_with("Connected To") && name.contains(instance) => Setting::Link,
        // Controls that draw over the picture.
        "OSD Text Mode" => Setting::Item("None"),
        "Show Border" | "Show Square" => Setting::Value(0),
        _ if name.starts_with("Insert ") => Setting::Value(0),
        "Fill Percentage of Frame" => Setting::Value(100),
        // Controls that move or scale the picture.
        "Horizontal Flip" | "Vertical Flip" => Setting::Value(0),
        _ if name.starts_with("Sensor Flipped") => Setting::Value(0),
        _ if name.starts_with("Enable Capture ") || name.starts_with("Enable Output ") => Setting::Value(0),
        // Controls that drop frames or the signal.
        "Percentage of Dropped Buffers" => Setting::Value(0),
        "DV Timings Signal Mode" => Setting::Item("Current DV Timings"),
        // If the picture is not looped, no two frames may be equal (see `Loopback::pass`).
        "Test Pattern" => Setting::Item("Noise"),
        _ => return None,
    })
}

/// Sets the controls of a node. Returns whether one of them turns the loopback on.
pub(super) fn set_controls(node: &File, instance: &str) -> io::Result<bool> {
    let mut linked = false;
    let mut query = QueryControl { id: CONTROL_NEXT, ..QueryControl::default() };
    // At the end of the list, the driver returns EINVAL.
    while ioctl(node, &QUERYCTRL, &mut query).is_ok() {
        let here = query;
        query = QueryControl { id: here.id | CONTROL_NEXT, ..QueryControl::default() };
        let name = field_text(&here.name);
        let settable = here.flags & CONTROL_FIXED == 0;
        if !settable || ![CONTROL_INTEGER, CONTROL_BOOLEAN, CONTROL_MENU].contains(&here.kind) {
            continue;
        }
        let Some(setting) = choose_setting(name, instance) else {
            continue;
        };
        let is_link = matches!(setting, Setting::Link) || name == "Loop Video";
        if is_link && linked {
            // An output can be connected to only one input.
            continue;
        }
        let value = match setting {
            Setting::Value(value) => Some(value),
            Setting::Item(item) => find_menu_index(node, &here, |entry| entry == item),
            Setting::Link => {
                let partner = format!("HDMI {instance}-");
                find_menu_index(node, &here, |entry| entry.contains(&partner))
            }
        };
        let value =
            value.ok_or_else(|| vivid_error(ErrorKind::Unsupported, &format!("the menu {name:?} lacks the required item")))?;
        name_step(name, set_control(node, here.id, value))?;
        if is_link {
            name_step(name, keep_link(node, here.id, value))?;
        }
        linked |= is_link;
    }
    Ok(linked)
}

fn set_control(node: &File, id: u32, value: i32) -> io::Result<()> {
    let mut control = Control { id, value };
    ioctl(node, &S_CTRL, &mut control)?;
    if control.value == value {
        return Ok(());
    }
    Err(vivid_error(ErrorKind::Unsupported, &format!("the control was set to {} instead of {value}", control.value)))
}

/// Checks that the link keeps the value that was just set, and sets it again if vivid resets it.
///
/// On kernels where the input is connected to an output, setting this link queues a work item that
/// updates the menu. If the work item runs before the control has its new value, vivid assumes
/// that the chosen output is linked to another input, and resets the control to the test pattern.
/// This happened in 2 of 300 tries on Linux 7.2.
fn keep_link(node: &File, id: u32, value: i32) -> io::Result<()> {
    for _ in 0..LINK_TRIES {
        thread::sleep(LINK_SETTLE_TIME);
        let mut control = Control { id, value: 0 };
        ioctl(node, &G_CTRL, &mut control)?;
        if control.value == value {
            return Ok(());
        }
        set_control(node, id, value)?;
    }
    Err(vivid_error(ErrorKind::Unsupported, &format!("the link was reset {LINK_TRIES} times")))
}

fn find_menu_index(node: &File, control: &QueryControl, is_it: impl Fn(&str) -> bool) -> Option<i32> {
    (control.minimum..=control.maximum).find(|&index| {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let mut entry = QueryMenu { id: control.id, index, ..QueryMenu::default() };
        // The driver returns EINVAL for an entry that the menu does not have.
        ioctl(node, &QUERYMENU, &mut entry).is_ok() && is_it(field_text(&entry.name))
    })
}
