// Backups by the commands of the README.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// incrementScript returns the loop that the README shows. It fails the test if
// the loop is longer than the README promises.
func incrementScript(t *testing.T) string {
	t.Helper()
	found := regexp.MustCompile("(?s)<!-- increment.sh -->\n```sh\n(.*?)```").FindStringSubmatch(read(t, "../README.md"))
	if found == nil {
		t.Fatal("README.md has no increment.sh")
	}
	if lines := strings.Count(found[1], "\n"); lines > 10 {
		t.Errorf("the loop has %d lines, want at most 10", lines)
	}
	return found[1]
}

// asUser runs a shell script as the daemon's user, in the daemon's directory.
func (d *daemon) asUser(script string, args ...string) result {
	d.t.Helper()
	cmd := exec.Command("sh", append([]string{"-e", "-c", script, "sh"}, args...)...)
	cmd.Dir = d.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: d.user}
	return end(d.t, cmd)
}

func TestIncrementsOfTheReadme(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name string
		user *syscall.Credential
	}{
		{"root", nil},
		{"nobody", nobody},
	} {
		t.Run(tc.name, func(t *testing.T) {
			need(t, "fusermount3")
			testIncrements(t, newDaemon(t, tc.user))
		})
	}
}

func testIncrements(t *testing.T, d *daemon) {
	const size = 32*miB + 512
	script := incrementScript(t)
	origin := makeOrigin(t, d.dir, "vda", size)
	if d.user != nil {
		if err := os.Chown(origin, int(d.user.Uid), int(d.user.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	d.start(origin)
	live := d.open("vda")
	rng := rand.New(rand.NewPCG(uint64(*seed), 3))
	t.Logf("repeat with -seed=%d", *seed)
	succeed := func(script string, args ...string) {
		t.Helper()
		if r := d.asUser(script, args...); r.status != 0 {
			t.Fatalf("status %d\n%s%s\n%s", r.status, r.stdout, r.stderr, script)
		}
	}

	backup := filepath.Join(d.dir, "backup.img")
	full := d.snapshot("full")
	succeed(`mkdir $1; cp $1/vda.img $2; cat $1/vda.cbt/number > $2.number; cmp $1/vda.img $2`, full, backup)

	for n := range 4 {
		changeForIncrement(t, live, rng, uint64(n+2))
		snap := d.snapshot(fmt.Sprint("inc", n))
		succeed(`mkdir $1`, snap)
		changeForIncrement(t, live, rng, uint64(n+3)) // what comes later is not in the increment
		image := filepath.Join(snap, "vda")
		read := readNumber(t, backup+".number")
		succeed(script, image, backup)
		succeed(`cmp $1.img $2`, image, backup)
		succeed(`rmdir $1`, snap)

		if n == 0 {
			succeed(`rmdir $1`, full) // the loop needs no older snapshot
		} else if now := readNumber(t, backup+".number"); now <= read {
			t.Errorf("the backup's number went from %d to %d", read, now)
		}
	}

	// History that nobody has makes the script fail, and leaves the copy alone.
	sum := run(t, "md5sum", backup)
	write(t, backup+".number", []byte("999999999\n"))
	succeed(`mkdir $1`, d.snapshot("last"))
	if r := d.asUser(script, d.snapshot("last", "vda"), backup); r.status == 0 {
		t.Error("an increment since an unknown snapshot was made")
	}
	if again := run(t, "md5sum", backup); again != sum {
		t.Error("an increment since an unknown snapshot changed the copy")
	}
}

// changeForIncrement makes changes of every kind, some of them far apart.
func changeForIncrement(t *testing.T, c *nbdConn, rng *rand.Rand, pass uint64) {
	t.Helper()
	p := make([]byte, 256*kiB)
	for range 20 {
		off, n := randomRange(rng, c.size, int64(len(p)))
		var err error
		switch rng.IntN(4) {
		case 0:
			err = c.zero(off, n)
		case 1:
			err = c.trim(off, n)
		default:
			Stamp(p[:n], "vda", off, pass)
			err = c.writeAt(p[:n], off)
		}
		if err != nil {
			t.Fatalf("change %d bytes at %d: %v", n, off, err)
		}
	}
	Stamp(p[:SectorSize], "vda", c.size-SectorSize, pass) // the part of a tracking block at the end
	if err := c.writeAt(p[:SectorSize], c.size-SectorSize); err != nil {
		t.Fatal(err)
	}
}

// The map, the text, the command and the images say the same: what differs
// between two images is inside the extents, and no tracking block is reported
// that nothing wrote to.
func TestExtentsAreExact(t *testing.T) {
	needRoot(t)
	const size, trackingBlock = 16 * miB, 64 * kiB
	d, _ := serveOrigin(t, size)
	live := d.open("vda")
	mkdir(t, d.snapshot("a"))
	base := readNumber(t, d.snapshot("a", "vda.cbt", "number"))

	wrote := map[int64]bool{}
	for _, block := range []int64{0, 1, 2, 17, 100, 255} {
		p := make([]byte, SectorSize)
		off := block*trackingBlock + 4096
		Stamp(p, "vda", off, 2)
		if err := live.writeAt(p, off); err != nil {
			t.Fatal(err)
		}
		wrote[block] = true
	}
	mkdir(t, d.snapshot("b"))

	since := fmt.Sprint(base)
	text := read(t, d.snapshot("b", "vda.cbt", "since", since))
	got := map[int64]bool{}
	end := int64(0)
	for line := range strings.Lines(text + "\n") {
		var off, n int64
		var kind string
		if _, err := fmt.Sscan(line, &off, &n, &kind); err != nil || kind != "data" && kind != "zero" {
			t.Fatalf("line %q: %v", line, err)
		}
		if off < end || off+n > size {
			t.Errorf("line %q is not sorted, or beyond the end", line)
		}
		for b := off / trackingBlock; b <= (off+n-1)/trackingBlock; b++ {
			got[b] = true
		}
		end = off + n
	}
	if fmt.Sprint(got) != fmt.Sprint(wrote) {
		t.Errorf("tracking blocks since %s\n got %v\nwant %v", since, got, wrote)
	}

	theMap := read(t, d.snapshot("b", "vda.cbt", "map"))
	above := byte(base - readNumber(t, d.snapshot("b", "vda.cbt", "base")))
	for b := range int64(len(theMap)) {
		if changed := theMap[b] > above; changed != wrote[b] {
			t.Errorf("map says that tracking block %d changed: %v, want %v", b, changed, wrote[b])
		}
	}
	if got := d.blksnap("cbt", "extents", "vda", "--since", since, "--at", "b"); got != text {
		t.Errorf("cbt extents\n got %s\nwant %s", got, text)
	}
	if got := d.try("cbt", "extents", "vda", "--since", "999999999"); got.status != 3 {
		t.Errorf("extents since an unknown number end with status %d, want 3: %s", got.status, got.stderr)
	}
}

// A number from before a new generation must not be found in it, however many
// snapshots were taken and whatever made the generation: a stale script would
// take the rest of the history for an increment.
func TestNumbersOfAnEarlierGenerationAreGone(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name  string
		renew func(d *daemon, origin string)
	}{
		{"reset", func(d *daemon, _ string) { d.blksnap("cbt", "reset", "vda") }},
		{"device removed and added", func(d *daemon, origin string) {
			eventually(d.t, "the device is removed", func() bool { return d.try("device", "remove", "vda").status == 0 })
			d.blksnap("device", "add", origin)
		}},
		{"written while stopped", func(d *daemon, origin string) { d.stop(); writeBehind(d.t, origin); d.start(origin) }},
		{"written after it was killed", func(d *daemon, origin string) {
			d.kill()
			time.Sleep(1100 * time.Millisecond) // the lease of its own writes ends
			writeBehind(d.t, origin)
			d.start(origin)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, origin := serveOrigin(t, 4*miB)
			for range 30 { // faster than one a second
				mkdir(t, d.snapshot("s"))
				rmdir(t, d.snapshot("s"))
			}
			generation := read(t, d.device("vda", "cbt", "generation"))
			number := fmt.Sprint(readNumber(t, d.device("vda", "cbt", "number")))
			p := make([]byte, SectorSize)
			Stamp(p, "vda", 0, 2)
			live := d.open("vda")
			if err := live.writeAt(p, 0); err != nil {
				t.Fatal(err)
			}
			live.Close()

			tc.renew(d, origin)
			if got := read(t, d.device("vda", "cbt", "generation")); got == generation {
				t.Errorf("the generation is still %s", got)
			}
			for range 40 { // until the new generation has come to that number, and on
				if path := d.device("vda", "cbt", "since", number); exists(path) {
					t.Fatalf("%s of an earlier generation exists, and says %q", path, read(t, path))
				}
				mkdir(t, d.snapshot("s"))
				rmdir(t, d.snapshot("s"))
			}
			if r := d.try("cbt", "extents", "vda", "--since", number); r.status != 3 {
				t.Errorf("cbt extents since it ends with status %d, want 3: %s", r.status, r.stderr)
			}
		})
	}
}

// writeBehind changes a byte of an origin that nobody serves.
func writeBehind(t *testing.T, origin string) {
	t.Helper()
	f, err := os.OpenFile(origin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
}
