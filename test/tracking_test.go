// Change maps of every kind, and their history.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Two devices with the smallest and the largest tracking block: what changed is exact
// in that unit, the copies that it leads to are equal to the image, and a start that
// does not name the unit again leaves everything as it is.
func TestTrackingBlocks(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img")
	for _, tc := range []struct {
		flag           string
		block, cluster int64
	}{
		{"4KiB", 4 * kiB, 4 * kiB},
		{"64KiB", 64 * kiB, 64 * kiB},
		{"16MiB", 16 * miB, 2 * miB},
	} {
		t.Run(tc.flag, func(t *testing.T) {
			const size = 40*miB + 512
			d, origin := serveOrigin(t, size, "--tracking-block", tc.flag)
			mkdir(t, d.snapshot("a"))
			full := filepath.Join(d.dir, "full")
			run(t, "cp", d.snapshot("a", "vda.img"), full)
			number := fmt.Sprint(readNumber(t, d.snapshot("a", "vda.cbt", "number")))

			live := d.open("vda")
			wrote := map[int64]bool{}
			p := make([]byte, SectorSize)
			for _, off := range []int64{0, 8 * kiB, miB + 3*kiB, 33 * miB, size - SectorSize} {
				Stamp(p, "vda", off, 2)
				if err := live.writeAt(p, off); err != nil {
					t.Fatal(err)
				}
				wrote[off/tc.block] = true
			}
			live.Close()
			mkdir(t, d.snapshot("b"))

			check := func() {
				t.Helper()
				if got := readNumber(t, d.device("vda", "cbt", "block_size")); got != tc.block {
					t.Errorf("block_size\n got %d\nwant %d", got, tc.block)
				}
				checkMap(t, d.snapshot("b", "vda.cbt", "map"), (size+tc.block-1)/tc.block)
				text := read(t, d.snapshot("b", "vda.cbt", "since", number))
				if got := changedBlocks(t, text, tc.block); fmt.Sprint(got) != fmt.Sprint(wrote) {
					t.Errorf("tracking blocks since %s\n got %v\nwant %v", number, got, wrote)
				}
				checkIncrement(t, d, full, number, tc.cluster)
			}
			check()
			generation := read(t, d.device("vda", "cbt", "generation"))
			d.kill()
			d.start(origin)
			check()
			d.stop()
			d.start(origin)
			check()
			if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
				t.Errorf("generation after a start without --tracking-block\n got %s\nwant %s", got, generation)
			}
		})
	}
}

// checkMap checks the length of a map.
func checkMap(t *testing.T, path string, blocks int64) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	bytes, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := int64(len(bytes)); got != blocks || st.Size() != blocks {
		t.Errorf("map has %d bytes, and %d by stat, want %d", got, st.Size(), blocks)
	}
}

// changedBlocks are the tracking blocks that the lines of a since/NUM touch.
func changedBlocks(t *testing.T, text string, block int64) map[int64]bool {
	t.Helper()
	blocks := map[int64]bool{}
	for line := range strings.Lines(text) {
		var off, n int64
		if _, err := fmt.Sscan(line, &off, &n); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		for b := off / block; b <= (off+n-1)/block; b++ {
			blocks[b] = true
		}
	}
	return blocks
}

// checkIncrement checks that what snapshot b's increment since number has, over the raw
// image full, is its image.
func checkIncrement(t *testing.T, d *daemon, full, number string, cluster int64) {
	t.Helper()
	copied := filepath.Join(d.dir, "copied")
	run(t, "cp", d.snapshot("b", "vda@"+number+".qcow2"), copied)
	run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", full, copied)
	run(t, "qemu-img", "check", copied)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", copied, d.snapshot("b", "vda.img"))
	if info, want := run(t, "qemu-img", "info", copied), fmt.Sprint("cluster_size: ", cluster, "\n"); !strings.Contains(info+"\n", want) {
		t.Errorf("increment has not %s%s", want, info)
	}
}

// The base moves up below hundreds of snapshots and the generation stays: increments
// of a backup that keeps pace are exact all the while, and what is asked from before the
// base is refused wherever it is asked.
func TestBaseMovesUp(t *testing.T) {
	needRoot(t)
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(uint64(*seed), 6))
	const size, snapshots = 4 * miB, 600
	d, origin := serveOrigin(t, size)
	copied := filepath.Join(d.dir, "copied")
	run(t, "cp", origin, copied)
	mkdir(t, d.snapshot("first"))
	generation := read(t, d.device("vda", "cbt", "generation"))
	first := readNumber(t, d.snapshot("first", "vda.cbt", "number"))
	base := readNumber(t, d.device("vda", "cbt", "base"))

	live, last := d.open("vda"), first
	p := make([]byte, 8*kiB)
	for n := range snapshots {
		off, m := randomRange(rng, size, int64(len(p)))
		Stamp(p[:m], "vda", off, uint64(n+2))
		if err := live.writeAt(p[:m], off); err != nil {
			t.Fatal(err)
		}
		mkdir(t, d.snapshot("s"))
		if n%75 == 74 {
			image := d.snapshot("s", "vda")
			copyExtents(t, read(t, filepath.Join(image+".cbt", "since", fmt.Sprint(last))), image+".img", copied)
			run(t, "cmp", image+".img", copied)
			last = readNumber(t, filepath.Join(image+".cbt", "number"))
		}
		rmdir(t, d.snapshot("s"))
	}

	if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
		t.Errorf("generation\n got %s\nwant %s", got, generation)
	}
	number := readNumber(t, d.device("vda", "cbt", "number"))
	if number != first+snapshots {
		t.Errorf("number after %d snapshots\n got %d\nwant %d", snapshots, number, first+snapshots)
	}
	now := readNumber(t, d.device("vda", "cbt", "base"))
	if now <= base || number-now < 127 {
		t.Errorf("base\n got %d\nwant above %d, and at least 127 numbers below %d", now, base, number)
	}
	for _, old := range []int64{first, now - 1} {
		if path := d.device("vda", "cbt", "since", fmt.Sprint(old)); exists(path) {
			t.Errorf("%s exists, below the base %d", path, now)
		}
		r := d.try("cbt", "extents", "vda", "--since", fmt.Sprint(old))
		if want := fmt.Sprintf("only since %d to %d: a full read is due", now, number); r.status != 3 || !strings.Contains(r.stderr, want) {
			t.Errorf("cbt extents since %d: status %d: %s\nwant 3 and %q", old, r.status, r.stderr, want)
		}
	}
	d.blksnap("cbt", "extents", "vda", "--since", fmt.Sprint(now))

	// The first snapshot has its own history still.
	if got := read(t, d.snapshot("first", "vda.cbt", "since", fmt.Sprint(base))); got != "" {
		t.Errorf("changes of the first snapshot since %d\n got %q\nwant none", base, got)
	}
}

// copyExtents copies what a since/NUM says from an image to a copy.
func copyExtents(t *testing.T, text, image, to string) {
	t.Helper()
	for line := range strings.Lines(text) {
		var off, n int64
		if _, err := fmt.Sscan(line, &off, &n); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		if out, err := exec.Command("dd", "if="+image, "of="+to, "bs=1M", "conv=notrunc", "iflag=skip_bytes,count_bytes", "oflag=seek_bytes",
			fmt.Sprint("skip=", off), fmt.Sprint("count=", n), fmt.Sprint("seek=", off)).CombinedOutput(); err != nil {
			t.Fatalf("copy %s: %v: %s", line, err, out)
		}
	}
}
