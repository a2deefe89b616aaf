// The death of the process (docs/design.md, section 7).

package test

import (
	"errors"
	"flag"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var kills = flag.Int("kills", 100, "how often each test of the siege kills the daemon")

// build builds blksnap with another version than the one under test, without the
// race detector: it is about what a process leaves, and as many as can be.
func build(t *testing.T, version string) (path string) {
	t.Helper()
	path = filepath.Join(filepath.Dir(blksnapPath), "blksnap-"+version)
	if exists(path) {
		return path
	}
	succeed(t, exec.Command("go", "build", "-o", path, "-ldflags", "-X main.version="+version, "blksnap"))
	return path
}

// The daemon is killed at random moments while everybody uses it, and started
// again, now and then as another build of it.
func TestKilledUnderLoad(t *testing.T) {
	needRoot(t)
	rounds, binary := *kills, []string{build(t, "0.0.1"), build(t, "0.0.2")}
	if builtWithRace() { // which makes both sides ten times as slow
		rounds, binary = min(rounds, 4), []string{blksnapPath}
	}
	for _, tc := range []struct {
		name  string
		tight bool
	}{
		{"space for all", false},
		{"snapshots overflow", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Logf("repeat with -seed=%d", *seed)
			s := newSiege(t, tc.tight, binary...)
			s.prepare()
			for range rounds {
				s.live(s.rng.Int64N(300) + 1).endAfter(time.Duration(s.rng.IntN(3000)) * time.Microsecond)
				s.start()
				s.survey()
				if t.Failed() {
					return
				}
			}
			s.finish()
			t.Logf("%d kills: %s", rounds, s.story())
		})
	}
}

// Another build of the daemon goes on where one was stopped or killed.
func TestUpgrade(t *testing.T) {
	needRoot(t)
	const size = 8 * miB
	d, origin := serveOrigin(t, size)
	d.blksnap("snapshot", "create", "--writable", "before")
	p := make([]byte, size)
	Stamp(p, "vda", 0, 2)
	if err := errors.Join(d.open("vda").writeAt(p[:3*miB], 0), d.open("vda@before").writeAt(p[4*miB:5*miB], 4*miB)); err != nil {
		t.Fatal(err)
	}
	facts := func() []string {
		return []string{
			checksum(t, origin), checksum(t, d.snapshot("before", "vda.img")), read(t, d.snapshot("before", "state")),
			read(t, d.device("vda", "cbt", "generation")), read(t, d.device("vda", "cbt", "number")),
			checksum(t, d.device("vda", "cbt", "map")),
		}
	}
	want := facts()
	for _, tc := range []struct {
		version string
		end     func()
	}{
		{"0.0.1", d.stop},
		{"0.0.2", d.kill},
	} {
		tc.end()
		d.path = build(t, tc.version)
		d.start(origin)
		if got, want := read(t, d.mount, "version"), "blksnap "+tc.version; got != want {
			t.Errorf("version: got %q, want %q", got, want)
		}
		if got := facts(); !slices.Equal(got, want) {
			t.Errorf("after the start of %s\n got %v\nwant %v", tc.version, got, want)
		}
	}
}
