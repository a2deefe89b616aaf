// Real file systems on a live device, snapshotted frozen and while they work.

package test

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fileSystem is how one kind of file system is made, checked and mounted.
type fileSystem struct {
	name string
	size int64    // of the device, in bytes
	make []string // makes one
	// check finds no fault, and nothing to replay, in a file system that is
	// not mounted. It changes nothing.
	check []string
	// unclean says that freezing leaves the superblock's counters to the log,
	// so that check does not pass before that is replayed.
	unclean bool
	// peek has the options to mount an image without replaying anything;
	// empty where that is not possible beside the original.
	peek string
	// mount has the options to mount a writable copy beside the original.
	mount string
	// untwin, where it is not empty, gives a copy an identity of its own.
	untwin []string
}

var fileSystems = []fileSystem{
	{
		name: "ext4", size: 128 * miB,
		make:  []string{"mkfs.ext4", "-q", "-F"},
		check: []string{"e2fsck", "-fn"},
		peek:  "ro,noload",
		mount: "rw",
	},
	{
		name: "xfs", size: 320 * miB,
		make:    []string{"mkfs.xfs", "-q", "-f"},
		check:   []string{"xfs_repair", "-n"},
		unclean: true,
		peek:    "ro,norecovery,nouuid",
		mount:   "rw,nouuid",
	},
	{
		name: "btrfs", size: 160 * miB,
		make:   []string{"mkfs.btrfs", "-q", "-f"},
		check:  []string{"btrfs", "check", "--readonly"},
		mount:  "rw",
		untwin: []string{"btrfstune", "-f", "-m"},
	},
}

func TestFileSystems(t *testing.T) {
	needRoot(t)
	for _, fs := range fileSystems {
		t.Run(fs.name, func(t *testing.T) {
			need(t, fs.make[0], fs.check[0], "fsfreeze")
			testFileSystem(t, fs)
		})
	}
}

func testFileSystem(t *testing.T, fs fileSystem) {
	d, origin := serveOrigin(t, fs.size)
	dev := attach(t, d, "vda")
	run(t, fs.make[0], append(fs.make[1:], dev)...)
	at := mount(t, dev, fs.name, "rw")

	// The frozen snapshot must hold exactly these files.
	frozen := fill(t, at, "old", 40)
	run(t, "fsfreeze", "--freeze", at)
	err := os.Mkdir(d.snapshot("frozen"), 0o755)
	run(t, "fsfreeze", "--unfreeze", at)
	if err != nil {
		t.Fatal(err)
	}

	// Overwritten, removed and new files, all of them on stable storage
	// before the other snapshot is taken: it must hold them.
	written := overwrite(t, at, frozen)
	run(t, "sync", "-f", at)
	stopWriting := scribble(t, at)
	mkdir(t, d.snapshot("live"))
	stopWriting()

	if err := unmount(at); err != nil {
		t.Fatal(err)
	}
	wantClean(t, fs, dev)

	image := d.snapshot("frozen", "vda.img")
	if !fs.unclean {
		wantClean(t, fs, image)
	}
	if fs.peek != "" {
		at := mount(t, loop(t, image, true), fs.name, fs.peek)
		if got := hashes(t, at, ""); !maps.Equal(got, frozen) {
			t.Errorf("files in the frozen image, nothing replayed\n got %v\nwant %v", got, frozen)
		}
	}
	wantFiles(t, fs, d, image, frozen, "")
	wantFiles(t, fs, d, d.snapshot("live", "vda.img"), written, "scribble-")
	if at := mount(t, loop(t, origin, true), fs.name, "ro"); len(hashes(t, at, "scribble-")) != len(written) {
		t.Error("the origin lost files")
	}
}

// fill writes n files of random length and content and returns their hashes.
func fill(t *testing.T, dir, prefix string, n int) map[string]string {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{byte(n)})
	for i := range n {
		content := make([]byte, rng.Uint64()%(300*kiB))
		rng.Read(content)
		write(t, filepath.Join(dir, fmt.Sprint(prefix, i)), content)
	}
	return hashes(t, dir, "")
}

// overwrite changes a third of the files in place, removes a third, and makes
// new ones. It returns the hashes of what is there then.
func overwrite(t *testing.T, dir string, files map[string]string) map[string]string {
	t.Helper()
	for i, name := range slices.Sorted(maps.Keys(files)) {
		path := filepath.Join(dir, name)
		switch i % 3 {
		case 0:
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte(strings.Repeat(name, 1000)), 1000); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		case 1:
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	return fill(t, dir, "new", 20)
}

// scribble makes and changes files until the function that it returns is
// called. It returns when the first are there.
func scribble(t *testing.T, dir string) (stop func()) {
	t.Helper()
	begun, done, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				ended <- nil
				return
			default:
			}
			name := filepath.Join(dir, fmt.Sprint("scribble-", i%50))
			if err := os.WriteFile(name, []byte(strings.Repeat("scribble", i%5000)), 0o600); err != nil {
				ended <- err
				return
			}
			if i == 20 {
				close(begun)
			}
		}
	}()
	select {
	case <-begun:
	case err := <-ended:
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		close(done)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}

// wantFiles mounts a writable copy of an image, which replays its journal, and
// compares the files in it that do not begin with except to want. When it is
// unmounted it must be without fault.
func wantFiles(t *testing.T, fs fileSystem, d *daemon, image string, want map[string]string, except string) {
	t.Helper()
	copied := filepath.Join(d.dir, "copied")
	run(t, "cp", "--sparse=always", image, copied)
	dev := loop(t, copied, false)
	if len(fs.untwin) > 0 {
		run(t, fs.untwin[0], append(fs.untwin[1:], dev)...)
	}
	at := mount(t, dev, fs.name, fs.mount)
	if got := hashes(t, at, except); !maps.Equal(got, want) {
		t.Errorf("files in a copy of %s\n got %v\nwant %v", image, got, want)
	}
	if err := unmount(at); err != nil {
		t.Error(err)
	}
	wantClean(t, fs, dev)
	if err := os.Remove(copied); err != nil {
		t.Error(err)
	}
}

// wantClean checks a file system that is not mounted.
func wantClean(t *testing.T, fs fileSystem, path string) {
	t.Helper()
	if r := end(t, exec.Command(fs.check[0], append(fs.check[1:], path)...)); r.status != 0 {
		t.Errorf("%v %s: status %d\n%s%s", fs.check, path, r.status, r.stdout, r.stderr)
	}
}

// hashes returns the hash of each file in dir whose name does not begin with
// except.
func hashes(t *testing.T, dir, except string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, e := range entries {
		if e.IsDir() || except != "" && strings.HasPrefix(e.Name(), except) {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		found[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(content))
	}
	return found
}

// A trim of the file system reaches the origin where no snapshot needs the
// blocks, and never harms an image.
func TestTrim(t *testing.T) {
	needRoot(t)
	need(t, "mkfs.ext4", "fstrim", "e2fsck")
	d, origin := serveOrigin(t, 64*miB)
	dev := attach(t, d, "vda")
	run(t, "mkfs.ext4", "-q", "-F", "-E", "nodiscard", dev)
	at := mount(t, dev, "ext4", "rw")
	files := fill(t, at, "file", 40)
	run(t, "sync", "-f", at)
	mkdir(t, d.snapshot("s1"))
	for name := range files {
		if err := os.Remove(filepath.Join(at, name)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "fstrim", at)
	wantFiles(t, fileSystems[0], d, d.snapshot("s1", "vda.img"), files, "")

	rmdir(t, d.snapshot("s1"))
	before := blocks(t, origin)
	run(t, "sync", "-f", at)
	run(t, "fstrim", at)
	if err := unmount(at); err != nil { // remounting forgets what was trimmed before
		t.Fatal(err)
	}
	at = mount(t, dev, "ext4", "rw")
	run(t, "fstrim", at)
	if after := blocks(t, origin); after >= before {
		t.Errorf("fstrim left the origin at %d bytes on disk, before it had %d", after, before)
	}
}

// blocks returns how many bytes a file takes up on disk.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
