package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestDamagedState starts, after a loss of power, on a state directory in which one byte
// of a file is another one, the file is cut short, or of another version: the origin is
// served, and either what is damaged did not matter, or a new generation says what is
// wrong, and that a full copy is due. Numbers go on as far as they can be read.
func TestDamagedState(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.put(0)
	l.must(l.checkpoint())
	l.put(4 << regionShift)
	l.take()
	l.must(l.dev.noteTear(&tear{number: 1, snapshot: "s"}))
	l.fact("torn", func(f *powerFacts) { f.torn, f.mayTear, f.generation = true, true, "" })
	generation := l.dev.Changes().Generation()
	for _, name := range []string{"map", "regions", "rollback"} {
		node := l.disks.root.names["state"].names["devices"].names["vda"].names[name]
		t.Run(name, func(t *testing.T) {
			for at := int64(0); at < node.size; at++ {
				if at == 2*regionsHeader && name == "regions" {
					at = regionsSets // nothing is between
				}
				if at > regionsSets+16 && at%8 != 0 {
					continue // no regions are there
				}
				l.damage(t, name, generation, fmt.Sprintf("byte %d changed", at), func(n *inode) { n.patch(at, n.byteAt(at)^0x11) })
			}
			for size := int64(0); size < node.size; size += 1 + node.size/64 {
				l.damage(t, name, generation, fmt.Sprintf("cut to %d bytes", size), func(n *inode) { n.resize(size) })
			}
			for _, v := range []uint32{0, 2, 1 << 31} {
				l.damage(t, name, generation, fmt.Sprintf("version %d", v), func(n *inode) {
					for k, b := range binary.LittleEndian.AppendUint32(nil, v) {
						n.patch(8+int64(k), b)
						if name == "regions" {
							n.patch(regionsHeader+8+int64(k), b)
						}
					}
				})
			}
		})
	}
}

// damage starts on a state in which one file is damaged by do.
func (l *powerLife) damage(t *testing.T, name, generation, what string, do func(*inode)) {
	t.Helper()
	next := &powerLife{
		t: t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), 1, l.rng),
		facts: l.facts.clone(), value: l.value, where: name + ", " + what,
	}
	next.disks.before = next.ask
	do(next.disks.root.names["state"].names["devices"].names["vda"].names[name])
	next.disks.boot()
	// A record that cannot be read has taken its numbers with it; the clock has not.
	next.facts.reserved = name != "regions"
	next.check()
	defer next.stop()
	if next.dev.Changes().Generation() == generation {
		return
	}
	why, _ := next.why.Load().(string)
	said := strings.Contains(why, ErrDamaged.Error()) || strings.Contains(why, ErrVersion.Error())
	if name == "rollback" || !said || !strings.HasSuffix(why, "a full copy is due") {
		t.Errorf("%s, %s: a new generation begins and says %q", name, what, why)
	}
	if version := strings.HasPrefix(what, "version"); version && !strings.Contains(why, ErrVersion.Error()) {
		t.Errorf("%s, %s: refused for another reason: %q", name, what, why)
	}
}

func (n *inode) byteAt(off int64) byte {
	if s := n.sectors[off/SectorSize]; s != nil {
		return s[off%SectorSize]
	}
	return 0
}

// patch changes one byte of a file, and of no other that shares its sectors.
func (n *inode) patch(off int64, b byte) {
	s := new(sector)
	if was := n.sectors[off/SectorSize]; was != nil {
		*s = *was
	}
	s[off%SectorSize] = b
	n.sectors = maps.Clone(n.sectors)
	n.sectors[off/SectorSize] = s
}

// TestDamageInTheRunDirectory spoils a file of the run directory while nobody uses it. The
// start that finds it goes on with the map in the state directory, and says which file
// cost the device its images, and why.
func TestDamageInTheRunDirectory(t *testing.T) {
	change := func(at int64) func(string) error {
		return func(path string) error {
			b, err := os.ReadFile(path)
			if err == nil {
				b[at] ^= 0x11
				err = os.WriteFile(path, b, 0o600)
			}
			return err
		}
	}
	cut := func(path string) error { return os.Truncate(path, 10) }
	asDir := func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "x"), 0o700))
	}
	asLink := func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/none/x", path)) }
	for _, tc := range []struct {
		name, file string
		spoil      func(path string) error
		want       string
	}{
		{"magic of the lease", "lease", change(0), "its images are lost: lease: damaged state: "},
		{"version of the lease", "lease", change(8), "its images are lost: lease: state of another version"},
		{"a byte of the lease", "lease", change(20), "its images are lost: lease: damaged state: "},
		{"lease cut short", "lease", cut, "its images are lost: damaged state: lease: it is cut short"},
		{"lease cut short behind its header", "lease", func(path string) error { return os.Truncate(path, writtenAt) }, "its images are lost: damaged state: lease: it is cut short"},
		{"no lease", "lease", os.Remove, "its images are lost: lease: it is not there"},
		{"lease is a directory", "lease", asDir, "its images are lost: damaged state: lease: it is not a regular file"},
		{"lease is a link", "lease", asLink, "its images are lost: damaged state: lease: it is not a regular file"},
		{"magic of the map", "changes", change(0), "its images are lost: change map: no changed-block map"},
		{"version of the map", "changes", change(8), "its images are lost: change map: changed-block map of an unknown version"},
		{"map cut short", "changes", cut, "its images are lost: change map: damaged state: it is cut short"},
		{"no map", "changes", os.Remove, "its images are lost: change map: file does not exist"},
		{"map is a directory", "changes", asDir, "its images are lost: change map: it is not a regular file"},
		{"magic of an overlay", "overlay-0", change(0), "what was written to it is lost: damaged state: "},
		{"no overlay", "overlay-0", os.Remove, "what was written to it is lost: no such file or directory"},
		{"overlay emptied", "overlay-0", func(path string) error { return os.Truncate(path, 0) }, "what was written to it is lost: its file was emptied"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, siteSize)
			h.state = t.TempDir()
			var told []Event
			h.notify = func(e Event) {
				if e.Kind != EventGeneration {
					told = append(told, e)
				}
			}
			h.open()
			if _, err := h.cat.Take("s", []*Device{h.dev}, TakeOptions{Limit: time.Minute, Writable: true}); err != nil {
				t.Fatal(err)
			}
			put(t, h.dev, 1, 0, chunkSize)
			was := h.dev.Changes().Generation()
			release, err := h.dev.holdDurable()
			if err != nil {
				t.Fatal(err)
			}
			h.dev.writeDown() // which the first start does in its own time
			release()
			h.close()
			told = nil
			if err := tc.spoil(filepath.Join(h.dir, "run", "devices", "vda", tc.file)); err != nil {
				t.Fatal(err)
			}
			h.open()
			defer h.close()
			if len(told) != 1 || told[0].Kind != EventSnapshotFailed || !strings.HasPrefix(told[0].Text, tc.want) {
				t.Errorf("events\n got %+v\nwant one, of images: %s", told, tc.want)
			}
			if h.dev.Changes().Generation() != was {
				t.Errorf("a new generation has begun: %s", h.dev.Tracking().Reason())
			}
			p := make([]byte, chunkSize)
			if err := h.dev.Read(p, 0); err != nil || p[0] != 1 {
				t.Errorf("the origin is read with error %v, as %d, want 1", err, p[0])
			}
		})
	}
}

// TestDamagedCatalogue spoils the catalogue while nobody uses it: the next start serves
// the device, with the generation that it had, and says what became of the snapshots.
func TestDamagedCatalogue(t *testing.T) {
	change := func(at int) func(string) error {
		return func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if at >= catalogueHeader { // in the record that is in use
				for host.Uint64(b[at:][:8]) == stateFree && at%recordBytes == 0 {
					at += recordBytes
				}
				for at%recordBytes != 0 && host.Uint64(b[at-at%recordBytes:]) == stateFree {
					at += recordBytes
				}
			}
			b[at] ^= 0x11
			return os.WriteFile(path, b, 0o600)
		}
	}
	cutTo := func(n int64) func(string) error {
		return func(path string) error { return os.Truncate(path, n) }
	}
	asDir := func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "x"), 0o700))
	}
	for _, tc := range []struct {
		name  string
		spoil func(path string) error
		want  string
	}{
		{"magic", change(0), `damaged state: it does not begin with "blksnapC"`},
		{"version", change(8), "state of another version of blksnap: version"},
		{"boot", change(20), "damaged state: checksum of the header"},
		{"cut short", cutTo(memoryStep / 2), "damaged state: catalogue: it is cut short, to 32768 bytes"},
		{"emptied", cutTo(0), "damaged state: catalogue: it was emptied"},
		{"gone", os.Remove, "damaged state: catalogue: it is not there"},
		{"a directory", asDir, "damaged state: catalogue: it is not a regular file"},
		{"state of a record", change(catalogueHeader), "damaged state: catalogue: state 19 of a record"},
		{"name in a record", change(catalogueHeader + 44), "catalogue: damaged state: checksum of a record"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, siteSize)
			h.open()
			h.take("s")
			put(t, h.dev, 1, 0, chunkSize)
			h.close()
			run := filepath.Join(h.dir, "run")
			if err := tc.spoil(filepath.Join(run, "catalogue")); err != nil {
				t.Fatal(err)
			}
			problems, err := Inspection{Run: run, Slots: func(uint8) (int64, error) { return 1 << 30, nil }}.Inspect()
			if err != nil || len(problems) == 0 || filepath.Base(problems[0].File) != "catalogue" || problems[0].Advice == "" {
				t.Errorf("state check: %+v, error %v; want the catalogue, and what to do", problems, err)
			}
			c, why, err := OpenCatalogue(run, "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if why == nil || !strings.HasPrefix(why.Error(), tc.want) {
				t.Errorf("the start says\n got %v\nwant %s", why, tc.want)
			}
			if len(c.found) != 0 {
				t.Errorf("%d snapshots are found, want none", len(c.found))
			}
		})
	}
}

// TestDirectoriesInTheState puts a directory in the place of a file of the state directory.
// All is kept again at once, and what is in the directory stays.
func TestDirectoriesInTheState(t *testing.T) {
	for _, name := range []string{"map", "map.new", "regions", "regions.new", "rollback"} {
		for _, tc := range []struct {
			name    string
			content []string // of the directory, and of one that was set aside before
		}{
			{"empty", nil},
			{"with content", []string{""}},
			{"once more", []string{"", ".aside-1"}},
		} {
			t.Run(name+" "+tc.name, func(t *testing.T) {
				h := newHome(t, 1<<20)
				h.state = t.TempDir()
				h.open()
				h.writeDown()
				h.close()
				path := filepath.Join(h.state, "devices", "vda", name)
				if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				if err := os.Mkdir(path, 0o700); err != nil {
					t.Fatal(err)
				}
				for _, k := range tc.content {
					if err := os.MkdirAll(path+k, 0o700); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(filepath.Join(path+k, "precious"), []byte("kept"+k), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				h.open()
				if name == "regions.new" { // a record is begun with a generation
					if err := h.dev.Reset("test"); err != nil {
						t.Fatal(err)
					}
				}
				h.writeDown()
				if name == "rollback" {
					if !strings.HasPrefix(h.dev.State(), "failed: a rollback to an unknown snapshot did not end") {
						t.Errorf("state of the device\n got %s\nwant a rollback that did not end", h.dev.State())
					}
					if err := h.dev.forgetTear(); err != nil { // as another rollback does
						t.Error(err)
					}
				}
				was := h.dev.Changes().Generation()
				h.close()

				var told atomic.Value
				h.notify = func(e Event) { told.Store(e) }
				h.open()
				defer h.close()
				if got := h.dev.Changes().Generation(); got != was || told.Load() != nil {
					t.Errorf("generation at the next start: %s, event %v\nwant %s, none", got, told.Load(), was)
				}
				u := h.dev.durable.Load()
				if u == nil {
					t.Fatal("the next start does not go on with the record")
				}
				if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
					t.Errorf("%s is still there, of mode %v", name, st.Mode())
				}
				aside, err := filepath.Glob(path + ".aside-*")
				if err != nil || len(aside) != len(tc.content) {
					t.Errorf("set aside are %q (%v), want %d", aside, err, len(tc.content))
				}
				for k := range tc.content {
					// What was there first has its name.
					want := "kept" + tc.content[len(tc.content)-1-k]
					got, err := os.ReadFile(filepath.Join(fmt.Sprintf("%s.aside-%d", path, k+1), "precious"))
					if err != nil || string(got) != want {
						t.Errorf("what was set aside as %d: %q (%v), want %q", k+1, got, err, want)
					}
				}
			})
		}
	}
}

// writeDown has the map written down now.
func (h *home) writeDown() {
	h.t.Helper()
	release, err := h.dev.holdDurable()
	if err != nil {
		h.t.Fatal(err)
	}
	defer release()
	h.dev.writeDown()
	if h.dev.durable.Load() == nil {
		h.t.Error("the map was not written down")
	}
}
