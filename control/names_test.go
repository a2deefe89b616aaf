package control

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestCheckName(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   string
		ok   bool
	}{
		{"letter", "a", true},
		{"digit first", "0day", true},
		{"all kinds", "Aa0._-z", true},
		{"longest", strings.Repeat("x", 64), true},
		{"empty", "", false},
		{"too long", strings.Repeat("x", 65), false},
		{"dot first", ".hidden", false},
		{"dash first", "-rf", false},
		{"slash", "a/b", false},
		{"at", "vda@nightly", false},
		{"space", "a b", false},
		{"newline", "a\nb", false},
		{"zero", "a\x00", false},
		{"beyond ASCII", "größe", false},
		{"broken UTF-8", "a\xff", false},
		{"reserved", "latest", false},
		{"nearly reserved", "latest2", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := checkName("snapshot", tc.in)
			if ok := err == nil; ok != tc.ok {
				t.Errorf("checkName(%q)\n got %v\nwant ok: %v", tc.in, err, tc.ok)
			}
			if err != nil && !errors.Is(err, syscall.EINVAL) {
				t.Errorf("checkName(%q)\n got %v\nwant an error that is EINVAL", tc.in, err)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("checkName(%q) says %q, which is not one line", tc.in, err)
			}
		})
	}
}

func TestSplitOrigin(t *testing.T) {
	for _, tc := range []struct {
		name         string
		in           string
		device, path string // "" where it is refused
	}{
		{"base name", "/srv/vda.img", "vda", "/srv/vda.img"},
		{"last extension only", "/srv/vda.raw.img", "vda.raw", "/srv/vda.raw.img"},
		{"block device", "/dev/sda", "sda", "/dev/sda"},
		{"named", "root=/srv/vda.img", "root", "/srv/vda.img"},
		{"= in the path", "/a=b/disk.img", "disk", "/a=b/disk.img"},
		{"= in path and name", "x=/a=b/disk.img", "x", "/a=b/disk.img"},
		{"what is no name is a path", "/srv/a b=c.img", "", ""},
		{"no name in the base name", "/srv/my disk.img", "", ""},
		{"hidden file", "/srv/.img", "", ""},
		{"reserved by default", "/srv/latest.img", "", ""},
		{"reserved by name", "latest=/srv/a.img", "", ""},
		{"empty", "", "", ""},
		{"empty name", "=/srv/a.img", "", ""},
		{"empty path", "vda=", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			device, path, err := splitOrigin(tc.in)
			if device != tc.device || path != tc.path || (err == nil) != (tc.path != "") {
				t.Errorf("splitOrigin(%q)\n got %q, %q, %v\nwant %q, %q", tc.in, device, path, err, tc.device, tc.path)
			}
		})
	}
}

// TestEmptyName says what to write instead.
func TestEmptyName(t *testing.T) {
	_, _, err := splitOrigin("=ok.img")
	wantError(t, "no name before the =", err, `origin "=ok.img": the name before the = is empty: write NAME=ok.img`)
}

func TestTimeName(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600))
	taken := map[string]bool{}
	for _, want := range []string{"20260304T040607Z", "20260304T040607Z-2", "20260304T040607Z-3"} {
		got := timeName(at, func(n string) bool { return taken[n] })
		if got != want {
			t.Errorf("name of %v with %d taken\n got %s\nwant %s", at, len(taken), got, want)
		}
		taken[got] = true
	}
}
