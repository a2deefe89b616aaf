package control

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"blksnap/store"
)

// openPart opens a part that is closed when the test ends.
func openPart(t *testing.T, text string) store.Part {
	t.Helper()
	spec, err := store.ParseSpec(text)
	if err != nil {
		t.Fatal(err)
	}
	part, err := store.Open(spec, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { part.Close() })
	return part
}

func claim(t *testing.T, m *members, part store.Part) uint8 {
	t.Helper()
	no, err := m.claim(part, false)
	if err != nil {
		t.Fatal(err)
	}
	return no
}

// TestPartsKeepTheirNumbers starts several daemons one after the other. A part has
// the number that it had, and a number is never given to another part: slots that
// tables name would be looked for in the wrong one.
func TestPartsKeepTheirNumbers(t *testing.T) {
	dir := t.TempDir()
	run := t.TempDir()
	a, b := "file:"+filepath.Join(dir, "a")+":8MiB", "file:"+filepath.Join(dir, "b")+":8MiB"
	next := func(parts ...store.Part) []uint8 {
		t.Helper()
		m, err := readMembers(run, "boot")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		var numbers []uint8
		for _, p := range parts {
			numbers = append(numbers, claim(t, &m, p))
		}
		m.Boot = "boot"
		if err := m.write(run); err != nil {
			t.Fatal(err)
		}
		for _, p := range parts {
			p.Close()
		}
		return numbers
	}
	check := func(what string, got []uint8, want ...uint8) {
		t.Helper()
		if string(got) != string(want) {
			t.Errorf("%s: got numbers %v, want %v", what, got, want)
		}
	}
	check("first start", next(openPart(t, "mem:8MiB"), openPart(t, a), openPart(t, "mem:16MiB")), 1, 2, 3)
	check("another order", next(openPart(t, a), openPart(t, "mem:8MiB")), 2, 1)
	check("another part", next(openPart(t, b), openPart(t, a)), 4, 2)
	if err := os.Remove(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	check("a new file in the place of a part", next(openPart(t, a), openPart(t, b)), 5, 4)
}

// TestReadMembers reads set files that are not to be trusted.
func TestReadMembers(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"cut short", `{"version": 1, "boot": "this", "par`, "unexpected end of JSON input"},
		{"another boot", `{"version": 1, "sum": "00000000", "boot": "that"}`, "it is of another boot: file does not exist"},
		{"number twice", `{"version": 1, "sum": "00000000", "boot": "this", "parts": [{"no": 1}, {"no": 1}]}`, "a part has the number 1"},
		{"number zero", `{"version": 1, "sum": "00000000", "boot": "this", "parts": [{"no": 0}]}`, "a part has the number 0"},
		{"older", `{"boot": "this", "parts": []}`, "version 0, this is 1: another version of blksnap wrote it"},
		{"newer", `{"version": 2, "sum": "00000000", "boot": "this"}`, "version 2, this is 1: another version of blksnap wrote it"},
		{"no checksum", `{"version": 1, "boot": "this"}`, "it is damaged: checksum"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(membersPath(dir), seal([]byte(tc.text)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := readMembers(dir, "this")
		wantError(t, tc.name, err, "read "+membersPath(dir)+": "+tc.want)
	}
}

// TestDamagedMembers changes the set file byte by byte: whatever it is, it must not be
// taken for another origin, or another part.
func TestDamagedMembers(t *testing.T) {
	dir := t.TempDir()
	m := members{Boot: "this", Devices: []memberDevice{{DeviceRequest{Name: "a", Origin: "/srv/\xff.img"}, true}}, Parts: []memberPart{{No: 1, Spec: "mem"}}}
	if err := os.Mkdir(membersPath(dir), 0o700); err != nil { // whatever it is
		t.Fatal(err)
	}
	if err := m.write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := readMembers(dir, "this")
	if err != nil || len(got.Devices) != 1 || len(got.Parts) != 1 {
		t.Fatalf("what was written is read as %+v, error %v", got, err)
	}
	b, err := os.ReadFile(membersPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	for at := range b {
		spoiled := bytes.Clone(b)
		spoiled[at] ^= 1
		if err := os.WriteFile(membersPath(dir), spoiled, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readMembers(dir, "this"); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("byte %d changed\n got %+v, error %v\nwant it damaged", at, got, err)
		}
	}
}

func TestAddedComesBack(t *testing.T) {
	m := members{
		Devices: []memberDevice{
			{DeviceRequest{Name: "asked", Origin: "/asked"}, false},
			{DeviceRequest{Name: "added", Origin: "/added"}, true},
			{DeviceRequest{Name: "both", Origin: "/both"}, true},
		},
		Parts: []memberPart{
			{No: 1, Spec: "file:/asked"}, {No: 2, Spec: "mem:8MiB", Added: true}, {No: 3, Spec: "file:/added:1GiB", Added: true},
		},
	}
	devices := m.addedDevices([]DeviceRequest{{Name: "renamed", Origin: "/both"}})
	if len(devices) != 1 || devices[0].Name != "added" {
		t.Errorf("devices that come back: got %v, want added", devices)
	}
	parts := m.addedParts([]store.Spec{{Kind: store.Mem}})
	if len(parts) != 2 || parts[0].Kind != store.Mem || parts[1].Path != "/added" {
		t.Errorf("parts that come back: got %v, want mem and /added", parts)
	}
}
