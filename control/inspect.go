// state check: verifying all that is kept in the run and the state directory.
//
// A running daemon does it itself, for whoever asks on its control socket: it knows
// what is in memory, and which slots are in use. Without a daemon the command looks at
// the files, and holds the locks meanwhile, so that none starts. Nothing is changed.

package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/google/uuid"

	"blksnap/cow"
	"blksnap/store"
)

const (
	// inspections is how often a running daemon looks until it believes what it
	// found: what is on its way from one file to another is not found again.
	inspections = 4

	inspectPause = 50 * time.Millisecond

	// inspectWait is how long it waits each time for a part of the snapstore: all looks
	// together as long as a disk may take that was spun down.
	inspectWait = answerWait / inspections
)

// Inspecting says whose state is to be verified.
type Inspecting struct {
	Control string // empty: the control socket in Run
	Run     string // empty: what File says, or the default
	State   string
	File    string // configuration file, as serve takes it
}

// Inspect verifies the state of a daemon that may be running.
func Inspect(ctx context.Context, q Inspecting) ([]StateProblem, error) {
	c, err := Config{Run: q.Run, State: q.State, Control: q.Control, File: q.File}.withFile()
	if err != nil {
		return nil, err
	}
	p := defaultPlaces()
	run, state := cmp.Or(c.Run, p.run), cmp.Or(c.State, p.state)
	control := cmp.Or(c.Control, filepath.Join(run, controlSocket))
	if found, err := NewClient(control).Inspect(ctx); err == nil || !notThere(err) {
		return found, err
	}
	if q.Control != "" && q.Run == "" {
		return nil, fmt.Errorf("no daemon answers on %s: name its directories with --run and --state", control)
	}
	var dirs []string
	for _, dir := range slices.Compact([]string{run, state}) {
		if dir, err = filepath.Abs(dir); err != nil {
			return nil, err
		}
		unlock, holder, err := shareLock(dir)
		if err != nil {
			return nil, fmt.Errorf("lock directory %s: %w", dir, err)
		}
		if holder != nil {
			return holder.Inspect(ctx) // it listens elsewhere
		}
		defer unlock()
		dirs = append(dirs, dir)
	}
	return inspectFiles(dirs[0], dirs[len(dirs)-1])
}

// notThere says that there is no daemon, rather than one that fails.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// shareLock locks a directory against a daemon that starts, or returns the client of the
// one that has locked it. A directory that never had a lock is left without one.
func shareLock(dir string) (unlock func() error, holder *Client, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return func() error { return nil }, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == nil {
		return f.Close, nil, nil
	}
	defer f.Close()
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil, err
	}
	pid, control, ok := (&dirLock{f}).read()
	if !ok {
		return nil, nil, refuse(syscall.EBUSY, "in use by another blksnap")
	}
	holder = NewClient(control)
	if _, err := holder.Version(context.Background()); err != nil {
		return nil, nil, refuse(syscall.EBUSY, "in use by process %s, which does not answer", pid)
	}
	return nil, holder, nil
}

// inspectFiles verifies what is in the directories, which no daemon uses.
func inspectFiles(run, state string) ([]StateProblem, error) {
	parts, found := inspectMembers(run, answerWait)
	i := cow.Inspection{Run: run, State: state, Slots: parts.slots}
	problems, err := i.Inspect()
	return append(found, stateProblems(problems)...), err
}

// inspect verifies the daemon's state while it serves.
func (d *Daemon) inspect(ctx context.Context) ([]StateProblem, error) {
	var all []StateProblem
	for n := range inspections {
		found, err := d.inspectOnce()
		if err != nil {
			return nil, err
		}
		if n > 0 {
			found = slices.DeleteFunc(found, func(p StateProblem) bool { return !slices.Contains(all, p) })
		}
		if all = found; len(all) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(inspectPause):
		}
	}
	return all, nil
}

func (d *Daemon) inspectOnce() ([]StateProblem, error) {
	d.mu.Lock()
	run, dirs := d.run, d.dirs
	d.mu.Unlock()
	if run == "" {
		return nil, errors.New("the daemon is starting")
	}
	_, found := inspectMembers(run, inspectWait)
	i := cow.Inspection{Run: run, State: dirs[len(dirs)-1], Slots: d.pool.Slots, Used: d.pool.Used}
	if d.stateless != nil {
		i.State = ""
		found = append(found, StateProblem{"", d.stateless.Error(), "see to its disk, then start the daemon anew"})
	}
	problems, err := i.Inspect()
	return append(found, stateProblems(problems)...), err
}

// inspectedParts are the parts of the snapstore that the set file names, by number: how
// many slots each has, or why it has none.
type inspectedParts map[uint8]inspectedPart

type inspectedPart struct {
	slots int64
	err   error
}

func (p inspectedParts) slots(no uint8) (int64, error) {
	part, ok := p[no]
	if !ok {
		return 0, errors.New("the set file does not know it")
	}
	return part.slots, part.err
}

// inspectMembers verifies the set file and the headers of the parts that it names. It waits
// for each of these up to limit.
func inspectMembers(run string, limit time.Duration) (inspectedParts, []StateProblem) {
	parts := make(inspectedParts)
	boot, err := cow.BootID()
	if err != nil {
		return parts, []StateProblem{{"", err.Error(), ""}}
	}
	m, err := readMembers(run, boot)
	if errors.Is(err, fs.ErrNotExist) {
		return parts, nil // of another boot, or none: what needs it says so
	}
	if err != nil {
		return parts, []StateProblem{{membersPath(run), unread(err),
			"start the daemon anew: the snapshots and what was added while it ran are lost"}}
	}
	var found []StateProblem
	for _, p := range m.Parts {
		part, problem := inspectPart(p, limit)
		if parts[p.No] = part; problem != nil {
			found = append(found, *problem)
		}
	}
	return parts, found
}

// unread is why a file cannot be read, without its name.
func unread(err error) string {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// inspectPart verifies the header of a part. It waits for that up to limit.
func inspectPart(p memberPart, limit time.Duration) (inspectedPart, *StateProblem) {
	spec, err := store.ParseSpec(p.Spec)
	if err != nil {
		return inspectedPart{err: err}, nil
	}
	if spec.Path == "" {
		return inspectedPart{err: errors.New("it was in memory, which ended with its daemon")}, nil
	}
	type header struct {
		id    uuid.UUID
		slots int64
	}
	h, err := promptly(limit, "look at it", func() (h header, err error) {
		h.id, h.slots, err = store.Inspect(spec)
		return h, err
	}, func(header) {})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return inspectedPart{err: fmt.Errorf("%s is not there", spec.Path)}, nil // which may need nobody
	case errors.Is(err, errHangs):
		err = errors.New("it does not answer")
		return inspectedPart{err: err}, &StateProblem{spec.Path, err.Error(), "see to its disk, and check again"}
	case err != nil:
		return inspectedPart{err: err}, &StateProblem{spec.Path, err.Error(),
			"start the daemon anew without it, or with --force to make it anew; the snapshots that need it are lost"}
	case h.id != p.ID:
		return inspectedPart{err: fmt.Errorf("%s is another snapstore by now", spec.Path)}, nil
	}
	return inspectedPart{slots: h.slots}, nil
}

func stateProblems(problems []cow.Problem) []StateProblem {
	list := []StateProblem{}
	for _, p := range problems {
		list = append(list, StateProblem{p.File, p.Text, p.Advice})
	}
	return list
}
