package cow

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blksnap/store"
)

// TestOtherName serves one origin under the name a, then under b, and under a again. What
// was written as b is in no map of a: where it was, a begins a new generation and says
// why, and its snapshots are failed or gone.
func TestOtherName(t *testing.T) {
	const size = 4 << 20
	for _, tc := range []struct {
		name   string
		block  bool
		others []string // names between a and a
		write  bool
		reboot bool // before each start
		kept   bool
		why    string
	}{
		{"a file, the same name", false, []string{"a"}, true, false, true, ""},
		{"a file, another name, written", false, []string{"b"}, true, false, false, "written or changed behind our back"},
		{"a file, another name, not written", false, []string{"b"}, false, false, true, ""},
		{"a disk, the same name", true, []string{"a"}, true, false, true, ""},
		{"a disk, another name", true, []string{"b"}, true, false, false, `served as device "b" meanwhile`},
		{"a disk, two other names", true, []string{"b", "c"}, true, false, false, `served as device "c" meanwhile`},
		{"a disk, the same name, rebooted", true, []string{"a"}, true, true, true, ""},
		{"a disk, another name, rebooted", true, []string{"b"}, true, true, false, "given up before the machine went down"},
		{"a file, another name, rebooted", false, []string{"b"}, true, true, false, "written or changed behind our back"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			origin := filepath.Join(dir, "disk")
			if err := os.WriteFile(origin, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			if tc.block {
				origin = newLoop(t, origin)
			}
			boot, boots := thisBoot(t), 0
			// serve returns the generation, and why it is a new one.
			serve := func(name string, use func(d *Device)) (generation, why string) {
				t.Helper()
				now := boot
				if tc.reboot {
					boots++
					now = strings.Repeat(string(rune('0'+boots)), len(boot))
				}
				cat, lost, err := openSoundCatalogue(filepath.Join(dir, "run"), now)
				if err != nil || lost != nil {
					t.Fatal(err, lost)
				}
				cat.state = filepath.Join(dir, "state")
				part, err := store.OpenFile(filepath.Join(dir, "store"), 16<<20, false)
				if err != nil {
					t.Fatal(err)
				}
				pool := store.NewPool(part)
				o, err := OpenOrigin(origin)
				if err != nil {
					t.Fatal(err)
				}
				d, err := cat.Open(o, pool, Config{Name: name, Notify: func(e Event) {
					if e.Kind == EventGeneration {
						why = e.Text
					}
				}})
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := cat.Recover(); err != nil {
					t.Fatal(err)
				}
				awaitDurable(t, d, nil)
				use(d)
				generation = d.Changes().Generation()
				for _, err := range []error{d.Close(), pool.Close(), cat.Close()} {
					if err != nil {
						t.Error(err)
					}
				}
				return generation, why
			}
			if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
				t.Fatal(err)
			}
			write := func(d *Device) {
				if tc.write {
					put(t, d, 1, 2<<20, 4096) // not where a fingerprint looks
				}
			}
			was, _ := serve("a", write)
			for _, name := range tc.others {
				serve(name, write)
			}
			now, why := serve("a", func(*Device) {})
			if kept := now == was; kept != tc.kept || !strings.Contains(why, tc.why) {
				t.Errorf("generation kept: %v, because %q\nwant %v, %q", kept, why, tc.kept, tc.why)
			}
		})
	}
}
