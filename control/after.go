// The command that runs after a snapshot was taken, or was not, whatever happened: it
// may be what thaws a guest.
//
// We may be interrupted or killed, so another process runs it: when we say so, or when
// we are gone. It has a process group of its own, because all of ours may be killed,
// and takes no notice of what a terminal sends. The command it runs in our group as long
// as there is one: there it can ask for a password as one before the snapshot can.

package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

// afterName is what the helper is called.
const afterName = "blksnap-after"

// Afterwards is the life of that helper: it runs args[0] with sh when its input ends.
func Afterwards(args []string, in io.Reader, out io.Writer) int {
	group, _ := syscall.Getpgid(os.Getppid()) // of who waits for us to say that we are ready
	// Not ignored: the command would ignore them as well.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	fmt.Fprintln(out, "ready")
	<-inputEnds(in)
	err := runIn(group, args[0])
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		fmt.Fprintln(out, exit)
		return 1
	}
	if err != nil {
		fmt.Fprintln(out, err)
		return 1
	}
	return 0
}

// runIn runs a command in a process group, or in ours where that is gone.
func runIn(group int, command string) error {
	cmd := shell(context.Background(), command)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: group}
	if cmd.Start() != nil {
		cmd = shell(context.Background(), command)
		if err := cmd.Start(); err != nil {
			return err
		}
	}
	return cmd.Wait()
}

// runAfter sees to it that a command runs at the latest when we are gone. then runs it,
// and returns when it has ended.
func runAfter(command string) (then func() error, err error) {
	h, err := startHelper(afterName, []string{command}, &syscall.SysProcAttr{Setpgid: true})
	if err != nil {
		return nil, err
	}
	if h.word() != "ready" {
		return nil, fmt.Errorf("start %s: %w", afterName, h.end())
	}
	return func() error {
		h.in.Close()
		why := h.word()
		if err := h.end(); err != nil {
			return fmt.Errorf("--after %q: %s", command, cmp.Or(why, err.Error()))
		}
		return nil
	}, nil
}
