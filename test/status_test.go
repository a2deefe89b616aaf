// What NBD clients are told of holes and of changes.

package test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// extent is a range of an export with a property.
type extent struct{ off, n int64 }

// told is a device of which clients are told: a snapshot "one" was taken of it,
// it was written to, then a snapshot "two", and once more.
type told struct {
	*daemon
	origin string
	number int64  // of "one"
	one    string // a copy of the image
}

// toldSize is its size in bytes. The last tracking block is short.
const toldSize = 32*miB + SectorSize

// toldExports are the exports that are asked, what has data in them and what
// was written to since "one".
var toldExports = []struct {
	name        string
	data, dirty []extent
}{
	{
		"vda@two",
		[]extent{{0, 8 * miB}, {9 * miB, 7 * miB}, {20 * miB, 64 * kiB}, {32 * miB, SectorSize}},
		[]extent{{miB, 64 * kiB}, {5 * miB, 256 * kiB}, {8 * miB, miB}, {20 * miB, 64 * kiB}, {32 * miB, SectorSize}},
	},
	{
		"vda",
		[]extent{{0, 8 * miB}, {9 * miB, 7 * miB}, {20 * miB, 64 * kiB}, {24 * miB, 128 * kiB}, {32 * miB, SectorSize}},
		[]extent{{miB, 128 * kiB}, {5 * miB, 256 * kiB}, {8 * miB, miB}, {20 * miB, 64 * kiB}, {24 * miB, 128 * kiB}, {32 * miB, SectorSize}},
	},
}

func newTold(t *testing.T) *told {
	t.Helper()
	d, origin := serveOrigin(t, toldSize)
	s := &told{d, origin, 0, filepath.Join(d.dir, "one")}
	live := d.open("vda")
	put := func(off, n int64, pass uint64) {
		t.Helper()
		p := make([]byte, n)
		Stamp(p, "vda", off, pass)
		if err := live.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	put(11*miB, 64*kiB, 2) // before both: no change
	mkdir(t, d.snapshot("one"))
	run(t, "cp", d.snapshot("one", "vda.img"), s.one)
	s.number = readNumber(t, d.snapshot("one", "vda.cbt", "number"))
	put(miB+4*kiB, SectorSize, 2)
	put(5*miB+10*kiB, 200*kiB, 2) // unaligned, in four tracking blocks
	put(20*miB, 64*kiB, 2)        // was a hole
	put(32*miB, SectorSize, 2)    // the last
	if err := live.zero(8*miB, miB); err != nil {
		t.Fatal(err)
	}
	mkdir(t, d.snapshot("two"))
	put(miB, 128*kiB, 3)
	put(24*miB, 128*kiB, 3)
	return s
}

// content is a file with what an export holds.
func (s *told) content(export string) string {
	if export == "vda" {
		return s.origin
	}
	return s.snapshot("two", "vda.img")
}

func (s *told) context() string { return fmt.Sprint("qemu:dirty-bitmap:since-", s.number) }

// nbdinfoMap returns what nbdinfo says of a metadata context of an export: its
// extents, sorted by their descriptions.
func (s *told) nbdinfoMap(export, context string) map[string][]extent {
	s.t.Helper()
	found := map[string][]extent{}
	end := int64(0)
	for line := range strings.Lines(run(s.t, "nbdinfo", "--map="+context, s.uri(export)) + "\n") {
		var e extent
		var flags int
		var kind string
		if _, err := fmt.Sscan(line, &e.off, &e.n, &flags, &kind); err != nil || e.off != end {
			s.t.Fatalf("nbdinfo --map=%s of %s: line %q, want one that begins at %d: %v", context, export, line, end, err)
		}
		found[kind] = append(found[kind], e)
		end += e.n
	}
	if end != toldSize {
		s.t.Errorf("the map of %s ends at %d, want %d", export, end, toldSize)
	}
	return found
}

func TestClientsReadHolesAndChanges(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	s := newTold(t)
	for _, tc := range toldExports {
		t.Run(tc.name, func(t *testing.T) {
			if got := s.nbdinfoMap(tc.name, "base:allocation")["data"]; !slices.Equal(got, tc.data) {
				t.Errorf("nbdinfo --map, data\n got %v\nwant %v", got, tc.data)
			}
			if got := s.nbdinfoMap(tc.name, s.context())["dirty"]; !slices.Equal(got, tc.dirty) {
				t.Errorf("nbdinfo --map=%s, dirty\n got %v\nwant %v", s.context(), got, tc.dirty)
			}
			if got := s.qemuMap(t, tc.name); !slices.Equal(got, tc.dirty) {
				t.Errorf("qemu-img map with x-dirty-bitmap=%s\n got %v\nwant %v", s.context(), got, tc.dirty)
			}

			// With --sparse=0 it makes holes only where it is told of some.
			copied := filepath.Join(s.dir, "copied")
			run(t, "nbdcopy", "--sparse=0", s.uri(tc.name), copied)
			run(t, "cmp", copied, s.content(tc.name))
			var data int64
			for _, e := range tc.data {
				data += e.n
			}
			if got, most := blocks(t, copied), data+miB; got > most {
				t.Errorf("the copy takes up %d bytes, want at most %d: that was not read", got, most)
			}
		})
	}
}

// qemuOptions make qemu-img read a metadata context of an export.
func (s *told) qemuOptions(export, context string) []string {
	return []string{"--image-opts", "driver=nbd,server.type=unix,server.path=" + s.socket() + ",export=" + export + ",x-dirty-bitmap=" + context}
}

// qemuMap returns what QEMU takes for dirty: it says "data":false of that.
func (s *told) qemuMap(t *testing.T, export string) (dirty []extent) {
	t.Helper()
	var list []struct {
		Start, Length int64
		Data          bool
	}
	out := run(t, "qemu-img", append([]string{"map", "--output=json"}, s.qemuOptions(export, s.context())...)...)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("qemu-img map printed %s: %v", out, err)
	}
	for _, e := range list {
		if !e.Data {
			dirty = append(dirty, extent{e.Start, e.Length})
		}
	}
	return dirty
}

// needLibnbd is need for libnbd's Python module.
func needLibnbd(t *testing.T) {
	t.Helper()
	need(t, debianPython)
	if r := end(t, exec.Command(debianPython, "-c", "import nbd")); r.status != 0 {
		lacking(t, "python3-libnbd is not installed: "+r.stderr)
	}
}

// debianPython is the one that python3-libnbd is for.
const debianPython = "/usr/bin/python3"

// increment brings a copy of what a device held at a snapshot's number up to
// what an export holds, and returns the ranges that it copied.
func increment(t *testing.T, d *daemon, export string, number int64, copied string) string {
	t.Helper()
	return run(t, debianPython, "increment.py", d.uri(export), fmt.Sprint(number), copied)
}

// A client brings a copy of the first snapshot up to the second, and up to now.
func TestIncrementByLibnbd(t *testing.T) {
	needRoot(t)
	needLibnbd(t)
	s := newTold(t)
	for _, tc := range toldExports {
		t.Run(tc.name, func(t *testing.T) {
			copied := filepath.Join(t.TempDir(), "copy")
			run(t, "cp", s.one, copied)
			var want []string
			for _, e := range tc.dirty {
				want = append(want, fmt.Sprint(e.off, e.n))
			}
			if got := increment(t, s.daemon, tc.name, s.number, copied); got != strings.Join(want, "\n") {
				t.Errorf("ranges copied\n got %q\nwant %q", got, want)
			}
			run(t, "cmp", copied, s.content(tc.name))
		})
	}
	t.Run("history that nobody has", func(t *testing.T) {
		before := read(t, s.one)
		for _, num := range []int64{s.number + 3, s.base("vda") - 1} {
			r := end(t, exec.Command(debianPython, "increment.py", s.uri("vda"), fmt.Sprint(num), s.one))
			if r.status == 0 || !strings.Contains(r.stderr, "a full copy is due") {
				t.Errorf("increment since %d: status %d: %s%s", num, r.status, r.stdout, r.stderr)
			}
		}
		if read(t, s.one) != before {
			t.Error("the copy was written to")
		}
	})
}

// base is the oldest number that an export knows of.
func (s *told) base(export string) int64 {
	if export == "vda" {
		return readNumber(s.t, s.device("vda", "cbt", "base"))
	}
	return readNumber(s.t, s.snapshot("two", "vda.cbt", "base"))
}

// A number from before the history, after it, or of an earlier generation is not
// offered, by whatever name it is asked for; an image keeps its own history.
func TestContextsOffered(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo", "qemu-img")
	s := newTold(t)
	wantOffered := func(export string, listed []string, known, unknown []int64) {
		t.Helper()
		got := fmt.Sprint(exports(t, "nbdinfo", "--json", s.uri(export))[0]["contexts"])
		if want := fmt.Sprint(listed); got != want {
			t.Errorf("contexts of %s\n got %s\nwant %s", export, got, want)
		}
		for _, num := range known {
			s.nbdinfoMap(export, fmt.Sprint("qemu:dirty-bitmap:since-", num))
		}
		for _, num := range unknown {
			context := fmt.Sprint("qemu:dirty-bitmap:since-", num)
			for cmd, says := range map[*exec.Cmd]string{
				exec.Command("nbdinfo", "--map="+context, s.uri(export)):                                "does not support metadata context",
				exec.Command("qemu-img", append([]string{"map"}, s.qemuOptions(export, context)...)...): "Could not open image",
			} {
				if r := end(t, cmd); r.status == 0 || !strings.Contains(r.stderr, says) {
					t.Errorf("%s: status %d: %s\nwant that it fails and says %q", cmd, r.status, r.stderr, says)
				}
			}
		}
	}
	listed := func(numbers ...int64) []string {
		names := []string{"base:allocation"}
		for _, n := range numbers {
			names = append(names, fmt.Sprint("qemu:dirty-bitmap:since-", n))
		}
		return names
	}

	base := s.base("vda")
	wantOffered("vda", listed(s.number, s.number+1), []int64{base, s.number, s.number + 1}, []int64{base - 1, s.number + 2})
	wantOffered("vda@two", listed(s.number, s.number+1), []int64{base}, []int64{base - 1, s.number + 2})
	wantOffered("vda@one", listed(s.number), []int64{base}, []int64{base - 1, s.number + 1})

	// Without its snapshot a number is not listed, but found.
	rmdir(t, s.snapshot("one"))
	wantOffered("vda", listed(s.number+1), []int64{s.number}, nil)

	s.blksnap("cbt", "reset", "vda")
	wantOffered("vda", listed(), []int64{s.base("vda")}, []int64{base, s.number, s.number + 1})
	wantOffered("vda@two", listed(s.number+1), []int64{base, s.number}, []int64{s.base("vda")})
}
